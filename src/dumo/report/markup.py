"""Answers and errors as HTML: an answer holds its pictures, and what stands in either is escaped."""

import html
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jinja2

from dumo.io.picture import READABLE
from dumo.report.answer import Answer
from dumo.report.figure import embed
from dumo.runtime.signals import Stopped

HERE = Path(__file__).parent

Told = Callable[[BaseException], tuple[str, int] | None]  # what to say of an error; None: it is a defect


def rendered(answer: Answer) -> str:
    """The pictures row by row, small ones with their pixels as squares, and their words."""
    loader = jinja2.FileSystemLoader(HERE)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    cast(dict[str, Any], environment.filters)["embed"] = embed
    return environment.get_template("answer.html.j2").render(answer=answer, small=READABLE)


def style() -> str:
    """How that looks."""
    return (HERE / "answer.css").read_text(encoding="utf-8")


def said(error: Exception, told: Told) -> str:
    """What a person reads of an error; of a defect no more than that the terminal has its trace."""
    if isinstance(error, Stopped):
        return "this page is being closed"
    if (found := told(error)) is None:
        logging.getLogger(__name__).error("a defect", exc_info=error)
        return "this failed by a defect of dumo: the terminal says where"
    return html.escape(found[0])
