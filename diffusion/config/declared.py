"""What the arguments of a class or function may be, read from its source: nothing is imported, above all not torch.

    arguments("diffusion.samplers.ddim.DDIM")["eta"]     Kind of a number in [0, 1]

A target may be of this package or of the user's own; of one that is not found nothing is known. What a subclass leaves
to its parent, or does not have a constructor for, is looked up there.
"""

import ast
import builtins
import contextlib
import functools
import typing
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from diffusion import settings
from diffusion.settings import ANY, Kind, kind_of

VOCABULARY = {
    **{name: getattr(typing, name) for name in ("Annotated", "Any", "Literal", "Iterable")},
    **{name: value for name, value in vars(settings).items() if not name.startswith("_")},
    "Sequence": typing.Sequence,
    "Mapping": typing.Mapping,
}
INJECTED = ("self", "args", "kwargs")


class _Opaque(type):
    def __getitem__(cls, _: Any) -> Any:
        return cls

    def __getattr__(cls, _: str) -> Any:
        return cls

    def __call__(cls, *_: Any, **__: Any) -> Any:
        return cls


class _Unknown(metaclass=_Opaque):
    """A placeholder for names in annotations that are not types of settings, and for everything made from them."""


class _Names(dict):
    """The names that annotations of a module may use: ours, and the constants of the module."""

    def __init__(self, module: str, tree: ast.Module) -> None:
        super().__init__(VOCABULARY)
        self.module, self.imported = module, dict(_imports(tree))
        self.assigned = dict(_constants(tree))
        for name in self.assigned:
            self.pop(name, None)

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name):
            return getattr(builtins, name)
        if name in self.assigned:
            value = _evaluated(self.assigned[name], self)
        elif self.imported.get(name, "").startswith("diffusion."):
            module, _, original = self.imported[name].rpartition(".")
            found = _parsed(module)
            value = found[1].get(original) or found[1][original] if found else _Unknown
        else:
            value = _Unknown
        self[name] = value
        return value


def _imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(name, where it is from) of all that a module imports by `from`."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def _constants(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    """(name, value) of all that a module assigns at its top level."""
    for node in tree.body:
        for target in node.targets if isinstance(node, ast.Assign) else ():
            if isinstance(target, ast.Name):
                yield target.id, node.value
            elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = zip(target.elts, node.value.elts, strict=False)
                yield from ((name.id, value) for name, value in pairs if isinstance(name, ast.Name))


def _evaluated(node: ast.expr | None, names: _Names) -> Any:
    if node is None:
        return Any
    try:
        return eval(compile(ast.Expression(node), names.module, "eval"), {"__builtins__": {}}, names)
    except Exception:  # an annotation of any kind, which says nothing of settings then
        return Any


@functools.cache
def _parsed(module: str) -> tuple[ast.Module, _Names] | None:
    """A module's source, and the names that its annotations use; None where there is none to be read."""
    path: list[str] | None = None
    parts = module.split(".")
    try:
        for k in range(len(parts)):
            spec = PathFinder.find_spec(".".join(parts[: k + 1]), path)
            if spec is None:
                return None
            path = list(spec.submodule_search_locations or ())
        tree = ast.parse(Path(str(spec.origin)).read_text())
    except (OSError, SyntaxError, ValueError, ImportError):
        return None
    return tree, _Names(module, tree)


@functools.cache
def arguments(target: str) -> dict[str, Kind] | None:
    """The kinds of the arguments of a class or a function, by their names; None if it is not found, or takes any."""
    module, _, name = target.rpartition(".")
    found = _parsed(module)
    if found is None:
        return None
    tree, names = found
    node = next((node for node in tree.body if getattr(node, "name", None) == name), None)
    if node is None:
        return arguments(names.imported[name]) if name in names.imported else None
    if isinstance(node, ast.ClassDef):
        return _of_class(node, names, tree)
    return _of_function(node, names) if isinstance(node, ast.FunctionDef) else None


def _of_class(node: ast.ClassDef, names: _Names, tree: ast.Module) -> dict[str, Kind] | None:
    parents: dict[str, Kind] = {}
    for base in node.bases:
        if isinstance(base, ast.Name):
            local = any(isinstance(other, ast.ClassDef) and other.name == base.id for other in tree.body)
            where = f"{names.module}.{base.id}" if local else names.imported.get(base.id, "")
            parents |= (arguments(where) or {}) if "." in where else {}
    for inner in node.body:
        if isinstance(inner, ast.FunctionDef) and inner.name == "__init__":
            own = _of_function(inner, names)
            return None if own is None else {k: parents.get(k, ANY) if v == ANY else v for k, v in own.items()}
    fields = {
        inner.target.id: kind_of(_evaluated(inner.annotation, names))
        for inner in node.body
        if isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name)
    }
    return parents | fields or None


def _of_function(node: ast.FunctionDef, names: _Names) -> dict[str, Kind] | None:
    given = node.args
    if given.kwarg is not None:
        return None
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    return {a.arg: kind_of(_evaluated(a.annotation, names)) for a in every if a.arg not in INJECTED}


@functools.cache
def attributes(target: str) -> dict[str, Any]:
    """The constants of a class, and of those it inherits from, by their names."""
    module, _, name = target.rpartition(".")
    parsed = _parsed(module)
    node = next((n for n in parsed[0].body if isinstance(n, ast.ClassDef) and n.name == name), None) if parsed else None
    if node is None:
        return {}
    found: dict[str, Any] = {}
    for base in node.bases:
        if isinstance(base, ast.Name):
            found |= attributes(parsed[1].imported.get(base.id, f"{module}.{base.id}"))
    for inner in node.body:
        targets = inner.targets if isinstance(inner, ast.Assign) else [getattr(inner, "target", None)]
        value = getattr(inner, "value", None)
        for one in targets:
            if isinstance(one, ast.Name) and isinstance(value, ast.expr):
                with contextlib.suppress(ValueError):
                    found[one.id] = _constant(value, parsed[1])
    return found


def _constant(node: ast.expr, names: _Names) -> Any:
    """A literal, or a number computed from those that the module assigns, as NEIGHBOURHOOD + 1. ValueError for any
    other expression."""
    parts = (ast.Name, ast.Load, ast.Constant, ast.BinOp, ast.operator)
    if isinstance(node, ast.Name | ast.BinOp) and all(isinstance(part, parts) for part in ast.walk(node)):
        value = _evaluated(node, names)
        if isinstance(value, int | float):
            return value
    return ast.literal_eval(node)
