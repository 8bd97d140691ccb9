"""Write llms.txt and AGENTS.md, which programs read first, from the pages: `make docs`, or `python docs/agents.py`.

`llms_text` lists the pages of the site (https://llmstxt.org): the order and the titles are those of mkdocs.yml, the
words those of each page's first sentence. `agents_text` has what a program that changes dumo must know: an example from
README.md, and sections of CONTRIBUTING.md. A test refuses files that differ from what this writes.
"""

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
AT_THE_ROOT = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
SECTIONS = ("Commands", "Architecture", "Style", "Writing", "Tests")  # of CONTRIBUTING.md
LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
NOT_PROSE = re.compile(r"[#|<!$>]|:::|    ")  # how lines begin that are no sentences


class _Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, in which a function is named, without calling it."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)


def source_file(page: str) -> Path:
    """The file with the words of a page of mkdocs.yml; of a reference, the package that it documents."""
    file = ROOT / AT_THE_ROOT[page] if page in AT_THE_ROOT else ROOT / "docs" / page
    if not file.exists():  # the site makes it of a notebook or an example
        return next(made for ending in (".ipynb", ".py") if (made := file.with_suffix(ending)).exists())
    if file.read_text(encoding="utf-8").startswith(":::"):
        return ROOT / "src/dumo" / file.stem / "__init__.py"
    return file


def page_text(file: Path) -> str:
    """The words of a page as Markdown: of a notebook its first cell, of Python its docstring below the file's name."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".ipynb":
        return "".join(json.loads(text)["cells"][0]["source"])
    if file.suffix == ".py":
        name = f"dumo.{file.parent.name}" if file.name == "__init__.py" else file.name
        return f"# {name}\n\n{ast.get_docstring(ast.parse(text))}"
    return text


def first_sentence(text: str) -> str:
    """The first sentence below the heading, without links; "" of a page that begins otherwise."""
    prose = re.sub(r"```.*?```|<!--.*?-->|^\[!\[.*?$", "", text, flags=re.DOTALL | re.MULTILINE)
    for paragraph in re.split(r"\n\s*\n", prose):
        words = " ".join(LINK.sub(r"\1", paragraph).replace("**", "").split())
        if words and not NOT_PROSE.match(paragraph.strip("\n")):
            sentence = re.split(r"(?<=[.!?]) ", words)[0]
            return re.sub(r":$", ".", sentence)
    return ""


def title_of(text: str) -> str:
    """A page's heading."""
    return LINK.sub(r"\1", re.findall(r"^# (.+)$", text, re.MULTILINE)[0])


def entries(nav: Sequence[Any]) -> Iterator[tuple[str, str]]:
    """The pages of a part of the navigation: each title, "" where the page's heading is it, and the page."""
    for item in nav:
        if isinstance(item, Mapping):
            ((title, page),) = item.items()
            yield title, page
        else:
            yield "", item


def llms_text() -> str:
    """The content of llms.txt."""
    site = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), _Loader)
    lines = [f"# {site['site_name']}", "", f"> {site['site_description']}"]
    home, *parts = site["nav"]
    for part in [{"Start": [home]}, *parts]:
        ((name, pages),) = part.items()
        lines += ["", f"## {name.rstrip(':')}", ""]
        for title, page in entries(pages):
            file = source_file(page)
            place = file.relative_to(ROOT).as_posix()
            text = page_text(file)
            sentence = first_sentence(text)
            lines.append(f"- [{title or title_of(text)}]({place})" + (f": {sentence}" if sentence else ""))
    return "\n".join(lines) + "\n"


def agents_text() -> str:
    """The content of AGENTS.md."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    example = re.findall(r"^```python\n.*?^```$", readme, re.DOTALL | re.MULTILINE)[0]
    parts = [
        "# dumo, for coding agents",
        "`make docs` writes this file from README.md and CONTRIBUTING.md: change those.",
        "[llms.txt](llms.txt) lists all pages.",
        first_sentence(readme),
        "## Use",
        example,
        "`dumo --help` lists the commands; [docs/library.md](docs/library.md) has the Python.",
    ]
    for name in SECTIONS:
        section = re.findall(rf"^## {name}\n.*?(?=\n## |\Z)", contributing, re.DOTALL | re.MULTILINE)[0]
        parts.append(section.strip().replace("](#", "](CONTRIBUTING.md#"))
    return "\n\n".join(parts) + "\n"


def texts() -> dict[Path, str]:
    """What each file must hold."""
    return {ROOT / "llms.txt": llms_text(), ROOT / "AGENTS.md": agents_text()}


if __name__ == "__main__":
    for path, content in texts().items():
        path.write_text(content, encoding="utf-8")
