"""report.html of the laboratory: a page of each task that has been done in its folder, all in one file.

    folder/errors/page.json     what `write_page` made of a task
    folder/report.html          all of them, with a list of contents

A page is words, charts, tables, pictures and the ideas behind them, each idea its equation beside the function that
works it out, with that function's own words.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusion.files import MOST_TEXT, read_regular, write_atomically
from diffusion.page.chart import Chart, inline
from diffusion.page.html import environment
from diffusion.page.pictures import picture
from diffusion.page.words import shown

PAGE = "page.json"


@dataclass(frozen=True)
class Words:
    """A paragraph. kind: "" or "verdict", which stands out, or "warn", or "quiet"."""

    text: str
    kind: str = ""


@dataclass(frozen=True)
class Grid:
    """A table. rows: of as many cells as there are columns; numbers are written as a person reads them."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""


@dataclass(frozen=True)
class Charts:
    """Charts side by side."""

    charts: Sequence[Chart]


@dataclass(frozen=True)
class Picture:
    """A PNG or GIF file beside the page. words: what is to be seen on it."""

    path: Path
    words: str


@dataclass(frozen=True)
class Function:
    """A function or class of the package: its name, the file it stands in, its docstring."""

    name: str
    file: str
    doc: str


@dataclass(frozen=True)
class Idea:
    """An idea: a title, its equation, a few sentences, and what works it out."""

    title: str
    equation: str
    text: str
    functions: Sequence[Function] = ()


@dataclass
class Page:
    """What a task has found. title, lead: what was asked. command: that made it. blocks: in order."""

    title: str
    lead: str
    command: str
    blocks: list[Any] = field(default_factory=list)

    def add(self, *blocks: Any) -> None:
        self.blocks += blocks


def write_page(page: Page, folder: Path) -> Path:
    """Keep the page in `folder`, and make report.html of the folder above it anew; its path."""
    values = {"page": page, "blocks": [block_of(block) for block in page.blocks], "anchor": folder.name}
    html = template("experiment.html").render(values)
    write_atomically(folder / PAGE, json.dumps({"title": page.title, "html": html}))
    return write_laboratory(folder.parent)


def write_laboratory(folder: Path) -> Path:
    """report.html of all tasks that have a page below the folder, in the order of their names; its path."""
    pages = []
    for path in sorted(folder.glob(f"*/{PAGE}")):
        try:
            kept = json.loads(read_regular(path, MOST_TEXT))
        except (OSError, ValueError, RecursionError):
            kept = None
        if isinstance(kept, dict) and all(isinstance(kept.get(key), str) for key in ("title", "html")):
            pages.append({"name": path.parent.name, "title": kept["title"], "html": kept["html"]})
        else:
            print(f"warning: {path} is damaged and left out of the report.", file=sys.stderr, flush=True)
    text = template("laboratory.html").render({"title": "Laboratory", "pages": pages})
    write_atomically(folder / "report.html", text)
    return folder / "report.html"


def block_of(block: Any) -> dict[str, Any]:
    """What the template shows of a block."""
    kind = type(block).__name__.lower()
    if isinstance(block, Charts):
        return {"kind": kind, "charts": [chart for c in block.charts if (chart := inline(c)) is not None]}
    if isinstance(block, Picture):
        found = picture(block.path, 0)
        assert found is not None, f"{block.path} was just written"
        return {"kind": kind, "picture": found, "words": block.words, "name": block.path.name}
    if isinstance(block, Grid):
        numbers = [all(isinstance(row[k], int | float) for row in block.rows) for k in range(len(block.columns))]
        rows = [[{"text": shown(cell), "sort": None, "link": None} for cell in row] for row in block.rows]
        table = {"columns": list(zip(block.columns, numbers, strict=True)), "rows": rows}
        return {"kind": kind, "grid": block, "table": table}
    return {"kind": kind, "block": block}


def template(name: str) -> Any:
    return environment(Path(__file__).parent).get_template(name)
