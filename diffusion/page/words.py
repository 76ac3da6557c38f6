"""Values as a person reads them."""

from typing import Any

NOTHING = "–"


def shown(value: Any) -> str:
    """A value as a person reads it: 12,345, 3.142, yes, linear; a dash for what is not there."""
    if value is None or value == "":
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.4g}"
    return str(value)
