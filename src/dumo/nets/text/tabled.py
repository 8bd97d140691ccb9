"""Texts whose rows lie in a folder that `dumo encode` makes (`dumo.texts.table`)."""

from abc import abstractmethod
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from dumo.io.path import user_path
from dumo.texts.encoder import Encoder
from dumo.texts.table import Table, open_table, read_contents, require
from dumo.texts.tokens import Tokenizer
from dumo.types import FREE, Spec, UserError


class Tabled(Spec):
    """What is known of the folder."""

    kind: Any  # a literal; here for its place, the first
    root: str = Field(json_schema_extra=FREE)  # may begin with ~ and hold $NAMES
    identity: str | None = None  # of captions and encoder: looked up once, so that a run keeps to its rows

    @property
    @abstractmethod
    def by(self) -> Encoder | Tokenizer:
        """What makes rows of texts."""

    @property
    def folder(self) -> Path:
        """Raises UserError for a variable that is not set."""
        return user_path(self.root, "net.texts.root")

    @model_validator(mode="after")
    def _looked_up(self) -> "Tabled":
        if self.identity is None:
            try:
                there = read_contents(self.folder)
            except UserError:  # told when the net is built
                there = None
            if there and there.shards:
                object.__setattr__(self, "identity", there.identity)
        return self

    def table(self, captions: int) -> Table:
        """The folder, opened. Raises UserError where there is none, or it is of others, or of another encoder."""
        found = open_table(self.folder)
        require(found, self.by, captions, self.identity)
        return found
