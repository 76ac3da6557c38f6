"""The house rules of the package, read from its imports: a file imports only from a smaller layer."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "diffusion"

# Layer of each folder or file. A file imports only from a smaller one; within a folder imports are free.
LAYERS = {
    "errors": -2, "settings": -1, "progress": 0, "files": 0, "notices": 0, "images": 0, "noise": 0, "process": 0,
    "models": 1, "denoiser": 1, "objective": 1, "guidance": 1, "samplers": 1, "likelihood": 1, "data": 1, "metrics": 1,
    "config": 2, "distributed": 2, "runs": 2,
    "training": 3, "scoring": 3, "page": 3,
    "lab": 4,
    "build": 5, "command": 5,
    "run": 6, "library": 6, "benchmark": 6, "__init__": 7,
    "entry": 7, "__main__": 8,
    "train": 7, "sample": 7, "evaluate": 7, "prepare": 7, "report": 7, "lab/__main__": 7, "benchmark/__main__": 7,
}  # fmt: skip
# What each may import from outside beside the standard library.
OUTSIDE = {
    0: {"torch", "numpy", "scipy", "rich"},
    1: {"torch", "numpy"},
    "data": {"torch", "numpy", "webdataset", "pytorch_lightning", "lmdb", "PIL", "sklearn", "xxhash"},
    "metrics": {"torch", "numpy", "torchmetrics", "torch_fidelity", "scipy", "safetensors"},
    "likelihood": {"torch", "numpy", "scipy"},
    "config": {"hydra", "hydra_plugins", "omegaconf", "submitit"},
    "distributed": {"torch", "numpy", "lightning_fabric", "hydra", "hydra_plugins", "submitit"},
    "command": {"hydra", "omegaconf"},
    "runs": {"yaml"},
    "training": {"torch", "numpy", "PIL", "pytorch_lightning", "lightning_fabric", "lightning_utilities", "wandb"},
    "scoring": {"torch", "numpy", "PIL", "matplotlib"},
    "page": {"numpy", "jinja2", "markupsafe", "matplotlib", "PIL"},
    "lab": {"torch", "numpy", "scipy", "jinja2", "matplotlib", "PIL"},
    "build": {"torch", "numpy", "hydra", "omegaconf", "safetensors"},
    6: {"torch", "numpy", "hydra", "omegaconf", "pytorch_lightning", "PIL", "yaml"},
    7: {"omegaconf", "yaml"},
}  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """Its folder or file; a folder's __main__ is a command."""
    inside = path.relative_to(PACKAGE)
    return inside.with_suffix("").as_posix() if inside.name == "__main__.py" else inside.parts[0].removesuffix(".py")


def imports(path: Path, whole: bool = True) -> set[str]:
    """Modules a file imports; at its top level only, unless whole."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree) if whole else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            inside = node.module == "diffusion" or node.module.startswith("diffusion.")
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if inside else {node.module}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_only_from_a_smaller_layer(path):
    import sys

    part = part_of(path)
    layer = LAYERS[part]
    for name in imports(path) - {"diffusion.__version__"}:
        top = name.split(".")[0]
        if top == "diffusion":
            other = name.split(".")[1]
            same_folder = other == part.split("/")[0] and (PACKAGE / other).is_dir()
            assert same_folder or LAYERS[other] < layer, f"{path.name} imports {name}"
        elif top not in sys.stdlib_module_names:
            allowed = OUTSIDE.get(part, OUTSIDE.get(layer, set()))
            assert top in allowed, f"{path.name} imports {name}"


TORCH_FREE = [
    "diffusion.config.compose", "diffusion.config.check", "diffusion.config.sweep", "diffusion.command",
    "diffusion.distributed.submission", "diffusion.runs.folder", "diffusion.data.shards.index",
    "diffusion.data.shards.layout", "diffusion.process.grids", "diffusion.metrics.published", "diffusion.page",
    "diffusion.train", "diffusion.sample", "diffusion.evaluate", "diffusion.prepare", "diffusion.report",
    "diffusion.benchmark.__main__", "diffusion.lab.__main__",
]  # fmt: skip


def test_checking_a_configuration_needs_neither_torch_nor_lightning():
    import subprocess
    import sys

    code = f"import sys, importlib; [importlib.import_module(m) for m in {TORCH_FREE}]; "
    code += "print([m for m in ('torch', 'pytorch_lightning', 'matplotlib', 'sklearn') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- the house as a whole ----


def lines_of(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_no_folder_holds_more_than_an_eighth_of_the_lines():
    files = [path for path in FILES if "benchmark" not in path.relative_to(PACKAGE).parts]
    whole, by_folder = sum(map(lines_of, files)), {}
    for path in files:
        by_folder[path.parent] = by_folder.get(path.parent, 0) + lines_of(path)
    assert {folder.name: lines for folder, lines in by_folder.items() if lines > 0.12 * whole} == {}


def test_files_import_each_other_in_no_circle():
    """Also where an import stands within a function."""
    names = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in FILES}
    names = {name.removesuffix(".__init__"): path for name, path in names.items()}

    def file_of(name):
        return name if name in names else name.rpartition(".")[0]

    graph = {name: {file_of(other) for other in imports(path)} & names.keys() - {name} for name, path in names.items()}
    done, way = set(), []

    def visit(name):
        assert name not in way, " -> ".join([*way[way.index(name) :], name])
        if name not in done:
            way.append(name)
            for other in sorted(graph[name]):
                visit(other)
            done.add(way.pop())

    for name in graph:
        visit(name)


READS_RECORDS = ("runs", "build", "page")  # pages print what a run is recorded as


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_behind_the_door_no_setting_of_a_record_is_looked_up_by_its_name(path):
    """What is read of a checkpoint's configuration has a name and a type: `runs.recorded.Facts`."""
    text = path.read_text()
    if part_of(path) in READS_RECORDS or "ecord" not in text:
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("at", "group"):
            assert not isinstance(node.args[0], ast.Constant | ast.JoinedStr), f"{path.name}:{node.lineno}"


READS_CONFIGURATION = ("config", "build", "command", *(part for part, layer in LAYERS.items() if layer == 7))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_behind_the_door_no_function_takes_a_configuration(path):
    if part_of(path) in READS_CONFIGURATION:
        return
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            assert not {a.arg for a in given} & {"cfg", "config"}, f"{path.name}:{node.lineno}"
    assert (
        not [name for name in imports(path) if name.split(".")[0] in ("omegaconf", "hydra")]
        or path.name == "submission.py"
    )
