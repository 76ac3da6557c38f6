"""Results inside the published tables, as text for a terminal."""

import unicodedata
from collections.abc import Sequence

from diffusion.metrics.published.fill import Filled, filled
from diffusion.metrics.published.place import Row, places
from diffusion.metrics.published.protocol import common, deviations, not_recorded, unplaced


def table_text(rows: Sequence[Row]) -> str:
    """The rows inside the tables they belong to, what was done otherwise than in the papers, and why a row that has no
    place has none. Empty for no rows."""
    inside = [row for row in rows if places(row)]
    parts = [one_table(table) for table in filled(rows)]
    if inside:
        parts += listed("Not as in the papers:", common(inside, deviations))
        missing = common(inside, not_recorded)
        parts += [f"Not recorded with the result: {', '.join(missing)}."] if missing else []
    parts += unplaced(rows)
    return "\n\n".join(parts)


def listed(title: str, sentences: Sequence[str]) -> list[str]:
    return ["\n".join([title, *(f"  - {s}" for s in sentences)])] if sentences else []


def one_table(table: Filled) -> str:
    """Title and source, columns, lines; a result's own line begins with >."""
    lines = [["", *(c.title for c in table.columns)]]
    sections: list[str] = []
    for line in table.lines:
        mark = "> " if line.own else "  "
        lines.append([mark + line.title, *(line.cells.get(c, "") for c in table.columns)])
        sections.append(line.section)
    texts = aligned(lines)
    shown = [f"{table.table.title}: {table.table.source}", texts[0]]
    before = ""
    for section, text in zip(sections, texts[1:], strict=True):
        shown += [section] if section != before else []
        shown.append(text)
        before = section
    return "\n".join([*shown, *([table.table.note] if table.table.note else [])])


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Rows of words as the lines of a table; a combining mark, as in σ̂, takes no room."""
    widths = [max(map(width, column)) for column in zip(*lines, strict=True)]
    padded = ([c + " " * (w - width(c)) for c, w in zip(line, widths, strict=True)] for line in lines)
    return ["  ".join(words).rstrip() for words in padded]


def width(text: str) -> int:
    """How many places of a terminal a text takes."""
    return sum(not unicodedata.combining(c) for c in text)
