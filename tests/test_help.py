"""--help: the settings as the words make them, each with a description; completion in bash; the list of commands."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from omegaconf import OmegaConf

from diffusion.config.composer import compose, groups, our_options
from diffusion.config.help import _keys, allowed, description, help_text, title
from diffusion.config.values import COMMANDS, kind_at
from diffusion.settings import Between, Kind


def composed(command, words):
    cfg = compose(command, words, hydra=True)
    chosen = {k: v for k, v in cfg.hydra.runtime.choices.items() if not k.startswith("hydra/")}
    OmegaConf.set_struct(cfg, False)
    del cfg["hydra"]
    return cfg, chosen


@pytest.mark.parametrize("command", COMMANDS)
def test_every_setting_of_every_option_is_described(command):
    first = ["+experiment=digits"] if command == "train" else []
    _, chosen = composed(command, first)
    options = [(group, option) for group in chosen if group != "experiment" for option in our_options(group)]
    missing = set()
    for words in [[], *([f"{group}={option}"] for group, option in options)]:
        cfg, chosen = composed(command, [*first, *words])
        missing |= {key for key in _keys(cfg) if not description(key, command, chosen)}
    assert missing == set()


def test_every_option_has_a_title():
    assert [] == [
        (group, option) for group, options in groups().items() for option in options if not title(group, option)
    ]


def test_values_are_those_of_the_words():
    text = help_text("train", "Train.", ["+experiment=cifar10", "optimizer.lr=0.5"])
    assert "trainer.max_steps=800000" in text and "optimizer.lr=0.5" in text and "* cifar10" in text
    assert re.search(r"data\.batch_size=128 +images per optimizer step", text)
    assert max(map(len, text.splitlines())) <= 140


def test_what_is_required_is_said_to_be():
    text = help_text("sample", "Sample.", [])
    assert "checkpoint=REQUIRED" in text and "out=REQUIRED" in text and "??" not in text


def test_what_a_setting_may_be_is_said_in_words():
    cfg, _ = composed("sample", [])
    assert allowed(kind_at("sampler.eta", cfg, "sample")) == "a number, in [0, 1]"
    assert allowed(Kind(float, null=True, ranges=(Between(0, 1, ends="[)"),))) == "a number, in [0, 1), or null"


def test_a_description_goes_on_in_the_lines_of_comment_below(tmp_path):
    from diffusion.config.help import comments

    file = tmp_path / "a.yaml"
    file.write_text(
        "# A file.\na: 1                        # the first\n                            # and more\n"
        "group:                      # of it\n  b: {c: 2}               # inside\n  d: 3\nurl: http://x#y\n"
    )
    assert comments(file) == {"a": "the first and more", "group": "of it", "group.b.c": "inside"}


def test_help_knows_an_option_of_ones_own(tmp_path, call):
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "mine.yaml").write_text(
        "# A network of my own.\n_target_: mine.Net\nwidth: 3  # wide\n"
    )
    status, out = call("train", "--help", "--config-dir", "conf", "model=mine")
    assert status == 0 and re.search(r"\* mine +A network of my own\.", out) and re.search(r"model.width=3 +wide", out)


def test_help_refuses_what_the_command_refuses(call):
    status, out = call("train", "--help", "modle=unet")
    assert status == 2 and "Did you mean model?" in out


def test_the_commands_are_listed():
    done = subprocess.run([sys.executable, "-m", "diffusion"], cwd=ROOT, capture_output=True, text=True, check=True)
    for command in COMMANDS:
        assert re.search(rf"python -m diffusion\.{command} +\w", done.stdout)
    done = subprocess.run([sys.executable, "-m", "diffusion", "train"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Did you mean python -m diffusion.train?" in done.stderr


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """A folder with diffusion-train, as pip installs it."""
    folder = tmp_path_factory.mktemp("bin")
    lines = [
        f"#!{sys.executable}",
        "import sys",
        f"sys.path.insert(0, {str(ROOT)!r})",
        "from diffusion.entry import train",
    ]
    (folder / "diffusion-train").write_text("\n".join([*lines, "train()\n"]))
    (folder / "diffusion-train").chmod(0o755)
    return folder


def test_the_program_is_the_command(programs, tmp_path):
    """With modules of the current folder, as python -m has them."""
    (tmp_path / "mine.py").write_text("from diffusion.models.mlp import MLP as Mine\n")

    def run(*words):
        return subprocess.run([programs / "diffusion-train", *words], cwd=tmp_path, capture_output=True, text=True)

    done = run("model._target_=mine.Mine", "--cfg", "job")
    assert done.returncode == 0 and "_target_: mine.Mine" in done.stdout, done.stderr
    done = subprocess.run(
        [programs / "diffusion-train", "trainer.max_steps=0"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr == "error: trainer.max_steps=0 must be at least 1.\n"


@pytest.mark.parametrize(
    "line, found",
    [("sampler=d", "sampler=ddim"), ("trainer.max_st", "trainer.max_steps="), ("+experiment=gm", "+experiment=gmm")],
)
def test_bash_completes(programs, tmp_path, line, found):
    script = f"""
eval "$(diffusion-train -sc install=bash)"
COMP_LINE="diffusion-train {line}"; COMP_POINT=${{#COMP_LINE}}; COMP_CWORD=1
hydra_bash_completion
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    env = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert found in done.stdout.split(), done.stdout + done.stderr
    assert (
        "complete -o nospace -o default -F hydra_bash_completion diffusion-train"
        in subprocess.run(
            [programs / "diffusion-train", "-sc", "install=bash"], env=env, capture_output=True, text=True
        ).stdout
    )
