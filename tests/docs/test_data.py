"""The page of what is to be fetched: places that recipes read are told, addresses and hashes are those of the code."""

import re

import pytest

from docs.page import ROOT, lines
from dumo.config import recipe_files
from dumo.encoders import inception
from dumo.encoders.autoencoder import DcAe, SdVae
from dumo.evaluation.reference import STANDARDS

PAGE = ROOT / "docs/data.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_every_variable_that_a_recipe_reads_is_told() -> None:
    read = {name for recipe in recipe_files.names() for name in re.findall(r"\$([A-Z_]+)", recipe_files.text(recipe))}
    told = TEXT + (ROOT / "docs/install.md").read_text(encoding="utf-8")
    assert read
    assert [name for name in sorted(read) if name not in told] == []


def test_no_command_writes_to_a_folder_of_a_variable_that_is_not_set() -> None:
    """mkdir -p $DUMO_DATA/cifar10, typed before its export, would be /cifar10."""
    exported = {"PWD"}
    for line in lines(PAGE, "bash"):
        exported |= set(re.findall(r"export ([A-Z_]+)=", line))
        assert set(re.findall(r"\$([A-Z_]+)", line)) <= exported, line


@pytest.mark.parametrize(
    "text",
    [
        inception.SHA256,
        inception.VARIABLE,
        SdVae().weights,
        DcAe().weights,
        *(standard.url for standard in STANDARDS.values() if standard.url),
    ],
)
def test_what_the_code_knows_is_on_the_page(text: str) -> None:
    assert text in TEXT
