"""What is installed is the whole of it: packages, configs, templates; and it works away from the checkout."""

import configparser
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest
from conftest import ROOT

SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg", encoding="utf-8")
SOURCES = ("diffusion", "conf", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")


def files(folder: Path) -> list[Path]:
    """Files of the tree that belong to it, relative to its root."""
    found = (p.relative_to(ROOT) for p in (ROOT / folder).rglob("*") if p.is_file())
    return sorted(p for p in found if "__pycache__" not in p.parts)


def test_setup_cfg_lists_every_package():
    listed = SETUP["options"]["packages"].split()
    folders = {p.parent for p in files("diffusion") if p.suffix == ".py"}
    assert sorted(listed) == sorted({".".join(f.parts) for f in folders} | {"diffusion.conf"})
    assert all((ROOT / f / "__init__.py").is_file() for f in folders)


def test_setup_cfg_names_every_file_that_is_no_module():
    data = {name: value.replace(",", " ").split() for name, value in SETUP["options.package_data"].items()}
    for path in (p for p in files("diffusion") if p.suffix != ".py"):
        package = ".".join(path.parent.parts)
        assert any(fnmatch(path.name, pattern) for pattern in data.get(package, [])), path
    for path in files("conf"):
        assert any(path.relative_to("conf").match(p) for p in data["diffusion.conf"]), path
        assert path.suffix == ".yaml" and len(path.parts) <= 3, path


COMPOSE = """
from diffusion.config.check import check
from diffusion.config.compose import composed
from diffusion.config.composer import conf_dir, groups
for name in groups()["experiment"]:
    check(composed("train", [f"+experiment={name}"]))
    print(name)
print(conf_dir())
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """(the wheel, a Python that has it and our dependencies, but not the checkout)."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    for name in SOURCES:  # a copy: the build leaves folders in its tree, and takes up what older ones have left there
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / "source" / name)
    python = folder / "venv" / "bin" / "python"
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    build = "from setuptools.build_meta import build_wheel; build_wheel('..')"  # what pip and build call
    run(sys.executable, "-c", build, cwd=folder / "source")
    (wheel,) = folder.glob("*.whl")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    return wheel, python


def run(*words, cwd: Path) -> str:
    """Run it away from the checkout; its output."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    env |= {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, words)], cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{words}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_wheel_holds_the_package_its_configs_and_nothing_else(installed):
    names = [n for n in zipfile.ZipFile(installed[0]).namelist() if ".dist-info/" not in n]
    wanted = [p.as_posix() for p in files("diffusion")] + [f"diffusion/{p.as_posix()}" for p in files("conf")]
    assert sorted(names) == sorted(wanted)


@pytest.mark.slow
def test_wheel_says_what_it_needs(installed):
    with zipfile.ZipFile(installed[0]) as wheel:
        (name,) = [n for n in wheel.namelist() if n.endswith(".dist-info/METADATA")]
        lines = wheel.read(name).decode().split("\n\n")[0].splitlines()
    assert {"Name: diffusion", "License: MIT", "Requires-Python: <3.14,>=3.11"} <= set(lines)
    needed = {line.split(": ")[1] for line in lines if line.startswith("Requires-Dist") and "extra ==" not in line}
    assert len(needed) == len(SETUP["options"]["install_requires"].split())


@pytest.mark.slow
def test_every_experiment_composes_from_the_wheel(installed, tmp_path):
    *names, conf = run(installed[1], "-c", COMPOSE, cwd=tmp_path).split()
    assert names == sorted(p.stem for p in (ROOT / "conf" / "experiment").glob("*.yaml"))
    assert ROOT not in Path(conf).parents and conf.endswith("site-packages/diffusion/conf")


@pytest.mark.slow
def test_training_runs_from_the_wheel_in_an_empty_folder(installed, tmp_path):
    words = ["trainer.max_steps=3", "callbacks.score.num_images=10", "callbacks.grid.num_images=10"]
    output = run(installed[1], "-m", "diffusion.train", *words, "sampler.num_steps=3", cwd=tmp_path)
    assert "Report: runs/digits/report.html" in output
    run_folder = tmp_path / "runs" / "digits"
    left = {p.name for p in run_folder.iterdir()} | {p.name for p in (run_folder / "samples").iterdir()}
    assert left >= {"config.yaml", "checkpoints", "metrics.csv", "results.jsonl", "report.html", "step_00000003.png"}
    assert {p.name for p in tmp_path.iterdir()} == {"data", "runs"}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "conf").glob("*.yaml") if p.stem != "base"))
def test_help_works_from_the_wheel(name, installed, tmp_path):
    assert f"python -m diffusion.{name}" in run(installed[1], "-m", f"diffusion.{name}", "--help", cwd=tmp_path)
    assert not any(tmp_path.iterdir())
