"""Templates of pages: Jinja2, with everything escaped, and an error for what is not defined."""

from pathlib import Path
from typing import Any


def environment(*folders: Path) -> Any:
    """The templates of this folder, and of other ones."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader([Path(__file__).parent, *folders]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
