"""mkdocs hooks: formulas as MathML, links to source files, notebooks, examples, and pages in the root folder.

Browsers render MathML without scripts or fonts, so the site needs no network.
"""

import html
import json
import posixpath
import re
from pathlib import Path
from typing import Any

from griffe import Extension, Object
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL)
LINK = re.compile(r"(?<!!)\[(?P<words>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^)\s]+)\)")
MODULE = re.compile(r"\.\./src/(?P<path>dumo/(?P<room>\w+).*?)(?:/__init__)?(?:\.py)?")
LIKE_TEX = {  # upright and close, as in TeX
    "<mo>&#x02205;</mo>": '<mi mathvariant="normal">&#x02205;</mi>',
    "<mo>&#x02016;</mo>": '<mo stretchy="false">&#x02016;</mo>',
    "<mo>&#x0002F;</mo>": '<mo lspace="0" rspace="0">/</mo>',
}
STARRED = re.compile(r"(?<=\w)\*(?=[\s,.;:)]|$)", re.MULTILINE)  # u* in a docstring, which Markdown takes for emphasis
ROOT = {"../README.md": "index.md", "../CONTRIBUTING.md": "contributing.md", "../CHANGELOG.md": "changelog.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages in the root folder, the notebooks and the examples."""
    docs = Path(config.docs_dir)
    for name, page in ROOT.items():
        text = (docs / name).read_text(encoding="utf-8")
        text = re.sub(r"\]\((?!https?:|#)", "](../", text).replace("](../docs/", "](")
        files.append(File.generated(config, page, content=text))
    for book in docs.glob("notebooks/*.ipynb"):
        page = str(book.relative_to(docs).with_suffix(".md"))
        files.append(File.generated(config, page, content=cells(book)))
    for example in docs.glob("examples/*.py"):
        page = str(example.relative_to(docs).with_suffix(".md"))
        code = example.read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=f"# {example.name}\n\n```python\n{code}```\n"))
    return files


def cells(book: Path) -> str:
    """Return a notebook as Markdown, with its outputs."""
    made = [f'<a href="{book.name}" download>Download this notebook</a>']
    for cell in json.loads(book.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        made.append(f"```python\n{text}\n```" if cell["cell_type"] == "code" else text)
        made += [shown for output in cell.get("outputs", ()) if (shown := output_text(output))]
    return "\n\n".join([made[1], made[0], *made[2:]])


def output_text(output: dict[str, Any]) -> str:
    """Return an output of a cell as an image or a block, or "" if it is neither."""
    data = output.get("data", {})
    if "image/png" in data:
        png = "".join(data["image/png"]).replace("\n", "")
        return f'<img src="data:image/png;base64,{png}" alt="What the cell above draws">'
    text = "".join(output.get("text", data.get("text/plain", ""))).rstrip()
    return f"```text\n{text}\n```" if text else ""


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Redirect links to source files to the reference, or keep only their text if it does not contain them."""
    folder = posixpath.dirname(page.file.src_uri)

    def lead(found: re.Match[str]) -> str:
        words, target = found["words"], found["target"]
        if ":" in target or target.startswith("#"):
            return found[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        stem, ending = posixpath.splitext(path)
        if ending in (".ipynb", ".py") and files.get_file_from_path(f"{stem}.md"):
            return found[0].replace(ending, ".md")
        if files.get_file_from_path(f"{path}/index.md"):
            return f"[{words}]({target}/index.md)"
        if not path.startswith("../"):
            return found[0]
        if path in ROOT:
            return f"[{words}]({posixpath.relpath(ROOT[path], folder or '.')})"
        module = MODULE.fullmatch(path)
        if module and files.get_file_from_path(f"reference/{module['room']}.md"):
            return f"[{words}][{module['path'].replace('/', '.')}]"
        return words

    return LINK.sub(lead, markdown)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Convert formulas to MathML."""

    def draw(found: re.Match[str]) -> str:
        block = found["tag"] == "div"
        formula = convert(html.unescape(found["tex"]).strip(), display="block" if block else "inline")
        for wide, close in LIKE_TEX.items():
            formula = formula.replace(wide, close)
        return f'<div class="formula">{formula}</div>' if block else formula

    return FORMULA.sub(draw, content)


class Stars(Extension):
    """Escape the star of the targets u* and v* in docstrings."""

    def on_object(self, *, obj: Object, **_: object) -> None:
        """Take another star."""
        if obj.docstring:
            obj.docstring.value = STARRED.sub("⋆", obj.docstring.value)
