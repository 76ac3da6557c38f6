"""Lines of results.jsonl as a table: the better side, the paper's value, whether the two may be compared."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from diffusion.config.metrics import known, names
from diffusion.metrics.published import PUBLISHED_IMAGES, counterpart, of_samples
from diffusion.page.words import NOTHING, shown

Row = Mapping[str, Any]


def title_of(row: Row) -> str:
    """digits-FID ↓: the arrow points to the better side, where it is known."""
    name = row.get("name")
    arrow = {False: " ↓", True: " ↑"}.get(higher_is_better(name), "")
    return f"{row.get('metric', name)}{arrow}"


def higher_is_better(name: str | None) -> bool | None:
    """Which side of a metric is the better one; None where that is not known."""
    return known(name).higher_is_better if name in names() else None


def not_comparable(row: Row) -> str | None:
    """Why a score is not comparable with published ones, in a word or two; None if it is."""
    if not of_samples(row):
        return None
    reasons = {
        "extractor": row.get("extractor") != "inception",
        "too few images": (row.get("num_images") or 0) < PUBLISHED_IMAGES,
        f"{row.get('split')} split": row.get("split") not in (None, "train") and not of_same_split(row),
        "raw weights": row.get("weights") == "raw",
    }
    return ", ".join(reason for reason, holds in reasons.items() if holds) or None


def of_same_split(row: Row) -> bool:
    """Whether the value that a score is put beside is the published one of the same split."""
    published = counterpart(row)
    return published is not None and published.value == row.get("reference")


def difference(row: Row) -> float | None:
    """Value minus the paper's value."""
    value, reference = row.get("value"), row.get("reference")
    return None if value is None or reference is None else value - reference


def warnings(rows: Sequence[Row]) -> list[str]:
    """Which scores are not comparable with published ones, and why, once each in plain words."""
    rows = [r for r in rows if of_samples(r)]
    others = sorted({str(r.get("extractor")) for r in rows} - {"inception"})
    found = []
    if others:
        found.append(
            f"Scores from the features of {' and '.join(others)} cannot be compared with published FID, IS or KID, "
            f"which are from Inception's: only with each other."
        )
    if any((r.get("num_images") or 0) < PUBLISHED_IMAGES for r in rows):
        found.append(
            f"Scores of fewer than {PUBLISHED_IMAGES:,} images cannot be compared with published ones: FID falls as "
            f"the number of images grows."
        )
    return found


COLUMNS = {
    "num_images": "images", "num_reference": "real images", "split": "split", "sampler": "sampler", "eta": "η",
    "num_steps": "steps", "visits": "visits", "nfe": "NFE", "guidance_scale": "guidance", "seed": "seed",
    "step": "at step", "weights": "weights", "data": "data", "extractor": "extractor",
}  # fmt: skip
SPREADS = ("is_std", "kid_std", "standard_error")  # fields that say how sure a value is


def cell(value: Any, sort: Any = None, link: str | None = None) -> dict[str, Any]:
    """What the template's table shows: a text, the number to sort by if there is one, where a click leads."""
    is_number = isinstance(sort, int | float) and not isinstance(sort, bool)
    return {"text": shown(value), "sort": sort if is_number else None, "link": link}


def spreads(row: Row) -> Iterator[float]:
    yield from (row[name] for name in SPREADS if row.get(name) is not None)


def give_or_take(value: float | None, spread: float | None) -> str:
    """3.17, 9.46 ± 0.11."""
    return shown(value) + (f" ± {spread:.2g}" if value is not None and spread is not None else "")


def score_table(rows: Sequence[Row], with_run: bool = False) -> dict[str, list]:
    """{'columns': [(name, holds numbers)], 'rows': lists of cells}; columns that no row fills are left out."""
    table = []
    for row in rows:
        delta, reason = difference(row), not_comparable(row)
        cells = {"run": cell(row.get("run"), link=row.get("report"))} if with_run else {}
        cells |= {
            "metric": cell(title_of(row)),
            "value": cell(give_or_take(row.get("value"), next(spreads(row), None)), row.get("value")),
            "paper": cell(row.get("reference"), row.get("reference")),
            "difference": cell(None if delta is None else f"{delta:+.4g}", delta),
            "real vs real": cell(give_or_take(row.get("real_value"), row.get("real_std")), row.get("real_value")),
            "comparable": cell(f"no: {reason}" if reason else "yes"),  # with published scores
        }
        for key, name in COLUMNS.items():
            cells[name] = cell(str(row[key]) if key == "seed" and key in row else row.get(key), row.get(key))
        table.append(cells)
    used = [c for c in (table[0] if table else ()) if any(cells[c]["text"] != NOTHING for cells in table)]
    columns = [(c, any(cells[c]["sort"] is not None for cells in table)) for c in used]
    return {"columns": columns, "rows": [[cells[c] for c in used] for cells in table]}
