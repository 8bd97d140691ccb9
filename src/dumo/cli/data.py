"""What there is to fetch, and what is here: data sets, autoencoders, references."""

import json
from typing import Annotated

import typer

from dumo.cli.option import AsJson
from dumo.cli.terminal import out


def data(
    name: Annotated[str | None, typer.Argument(help="One of those that are listed, such as cifar10.")] = None,
    as_json: AsJson = False,
) -> None:
    """List data sets and models that recipes need: what they are, how to get them, and whether they are here."""
    from dumo.run.plan import catalogue

    items = [catalogue.told(item) for item in (catalogue.CATALOGUE if name is None else [catalogue.named(name)])]
    if as_json:
        print(json.dumps(items[0] if name else items))
        return
    for item in items:
        state = {True: "there", False: "not there", None: "you name it"}[item["there"]]
        out.print(f"{item['name']:16} {state:10} {item['what']}", soft_wrap=True)
        if not name:
            continue
        shown = [("from", item["source"]), *(("get it by", line) for line in item["get"]), ("layout", item["layout"])]
        shown += [("sha256", item["sha256"])] if item["sha256"] else []
        shown += [("looked at", f"{one['place']}: {one['state']}") for one in item["looked"]]
        for title, text in [*shown, ("recipes", ", ".join(item["recipes"]) or "none of the packaged ones")]:
            out.print(f"  {title:10} {text}", soft_wrap=True)
    if not name:
        out.print("\nHow to get one, and where it is looked for:  dumo data NAME", soft_wrap=True)
