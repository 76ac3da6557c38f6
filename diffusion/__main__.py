"""List the commands: python -m diffusion."""

import ast
import importlib.util
import sys
from pathlib import Path

from diffusion import __version__
from diffusion.entry import NAMES


def first_line(name: str) -> str:
    """Return what a command does: the first line of its docstring, read without importing it."""
    found = Path(str(importlib.util.find_spec(f"diffusion.{name}").origin))
    main = found.with_name("__main__.py") if found.name == "__init__.py" else found
    return (ast.get_docstring(ast.parse(main.read_text())) or "").splitlines()[0]


def main() -> None:
    print(f"diffusion {__version__}: train, sample and score denoising diffusion models\n")
    for name in NAMES:
        print(f"  python -m diffusion.{name:10} {first_line(name)}")
    print('\n--help after a command lists its settings. In Python: model = diffusion.load("runs/digits")')
    if sys.argv[1:] and sys.argv[1:] not in (["--help"], ["-h"]):
        word = sys.argv[1]
        name = f"python -m diffusion.{word}" if word in NAMES else "one of the commands above"
        print(f"error: {word}: unknown argument. Did you mean {name}?", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
