"""Packages that parse the files of others, or serve, have an upper bound in pyproject.toml."""

from pathlib import Path

PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_what_parses_the_files_of_others_and_serves_has_an_upper_bound() -> None:
    lines = PROJECT.read_text(encoding="utf-8")
    parsers = "gradio transformers diffusers accelerate peft pillow pyarrow pyyaml safetensors jinja2"
    for name in parsers.split():
        asked = [line for line in lines.split('"') if line.startswith(f"{name}>=")]
        assert asked, name
        assert all(",<" in line for line in asked), name
