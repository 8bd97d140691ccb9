"""The command `recipes`, which lists what can be trained by name."""

import json
from typing import Annotated

import typer
from rich.table import Table

from dumo.cli.option import AsJson
from dumo.cli.terminal import PlainConsole, out
from dumo.config import recipe_files as shipped_recipes


def recipes(
    as_json: AsJson = False,
    as_schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of recipes, for editors.")] = False,
) -> None:
    """List the recipes that ship with dumo.

    Examples:
    dumo recipes
    dumo recipes --schema > recipe.schema.json
    """
    if as_schema:
        from dumo.config.schema import schema

        print(json.dumps(schema()))
        return
    if as_json:
        print(json.dumps({"recipes": shipped_recipes.rows()}))
        return
    width = out.width if out.is_terminal else 1000  # a line each, to be searched
    wide = PlainConsole(width=width, highlight=False)
    for group, names in shipped_recipes.by_group().items():
        table = Table(box=None, show_header=False, padding=(0, 0, 0, 2), title=group, title_justify="left")
        table.title_style = "bold"
        for name in names:
            table.add_row(name, shipped_recipes.tree(name)["about"])
        wide.print(table)
        wide.print()
    wide.print("Look at one: dumo show NAME")
    wide.print("Train one:   dumo train NAME")
    wide.print("Change one:  dumo show NAME --yaml > my.yaml")
