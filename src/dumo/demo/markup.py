"""An answer as HTML that holds its pictures: what stands in it is escaped, and nothing of it is fetched."""

from pathlib import Path
from typing import Any, cast

import jinja2

from dumo.demo.answer import Answer
from dumo.io.picture import READABLE
from dumo.report.figure import embed

HERE = Path(__file__).parent


def rendered(answer: Answer) -> str:
    """The pictures row by row, small ones with their pixels as squares, and their words."""
    loader = jinja2.FileSystemLoader(HERE)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    cast(dict[str, Any], environment.filters)["embed"] = embed
    return environment.get_template("answer.html.j2").render(answer=answer, small=READABLE)


def style() -> str:
    """How that looks."""
    return (HERE / "answer.css").read_text(encoding="utf-8")
