"""What all tests share."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.path.insert(0, str(ROOT))


LONGEST = (
    "slurm", "score_runs", "evaluation", "failure", "digits", "ranks", "resume", "prepare_set", "metrics", "modes",
    "fuzz", "wandb", "chaos", "launch", "lab", "data_stream", "fingerprint",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """The longest files first: a file is one process's, and all are to end together."""
    place = {f"test_{name}": k for k, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """A cache folder of the session's own: nothing is taken from this machine's, and nothing is left there."""
    with pytest.MonkeyPatch.context() as patched:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        patched.setenv("MPLCONFIGDIR", os.environ.get("MPLCONFIGDIR") or str(home / Path("matplotlib")))  # of fonts
        patched.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The root of a data set of digits with its classifier, made once a session."""
    from diffusion.build.extractors import prepare_digits

    root = tmp_path_factory.mktemp("data") / "digits"
    prepare_digits(root)
    return root


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """The root of the numbered images of `numbered.py`."""
    from numbered import write_numbered

    return write_numbered(tmp_path_factory.mktemp("numbered"))


def rows(path: Path) -> dict[str, dict]:
    """The rows of a results.jsonl by the names of the scores, the last of each."""
    return {row["name"]: row for row in map(json.loads, path.read_text().splitlines())}


@pytest.fixture
def command(tmp_path):
    """`command("train", *words)`: a command as a user runs it, in an empty folder, from this checkout."""

    def run(name: str, *words: str, cwd: Path | None = None, check: int | None = None, **environment: str):
        env = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "SLURM_"))}
        env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
        done = subprocess.run(
            [sys.executable, "-m", f"diffusion.{name}", *words],
            cwd=cwd or tmp_path, env=env, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        if check is not None:
            assert done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


def command_module(name: str) -> ModuleType:
    """The module of a command: a file of the package, or the `__main__` of one of its folders."""
    folder = (ROOT / "diffusion" / name / "__main__.py").is_file()
    return importlib.import_module(f"diffusion.{name}" + (".__main__" if folder else ""))


def inside(name: str, words: list[str], folder: Path) -> int:
    """A command inside this process and in this folder, which saves the imports; its exit status."""
    argv, here = sys.argv, os.getcwd()
    sys.argv = [f"diffusion.{name}", *words]
    os.chdir(folder)
    try:
        command_module(name).main()
        return 0
    except SystemExit as e:
        return e.code or 0
    finally:
        sys.argv = argv
        os.chdir(here)


@pytest.fixture
def command_inside(tmp_path, capfd):
    """What `command` gives, by `inside`: for what is the same in this process and takes torch seconds to import."""

    def run(name: str, *words: str, check: int | None = None) -> subprocess.CompletedProcess:
        capfd.readouterr()
        status = inside(name, list(words), tmp_path)
        done = subprocess.CompletedProcess([name, *words], status, *capfd.readouterr())
        assert check in (None, status), done
        return done

    return run


@pytest.fixture
def call(tmp_path, capfd):
    """`call("train", *words)`: `inside`, in an empty folder; (status, what it printed)."""

    def run(name: str, *words: str) -> tuple[int, str]:
        status = inside(name, list(words), tmp_path)
        out, err = capfd.readouterr()
        return status, out + err

    return run
