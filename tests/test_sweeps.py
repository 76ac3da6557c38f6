"""Sweeps (-m): values in the form of their kind, words with an effect in some jobs alone, refusals before all."""

import pytest
from omegaconf import OmegaConf

from diffusion.config.compose import check_words, composed
from diffusion.config.effect import job_of
from diffusion.config.sweep import check_jobs, jobs, run_of
from diffusion.errors import Refusal

HERE = ["+experiment=digits"]


@pytest.mark.parametrize(
    "word, values",
    [
        ("trainer.max_steps=3.0,4.0", [3, 4]),
        ("trainer.precision=32,bf16-mixed", ["32", "bf16-mixed"]),
        ("name=007,1e3,b", ["007", "1e3", "b"]),
        ("name='a, b',7", ["a, b", "7"]),
        ("metrics=fid,[is,kid]", [["fid"], ["is", "kid"]]),
        ("seed=range(1,3)", [1, 2]),
        ("optimizer.lr=1e-4,2", [1e-4, 2]),
    ],
)
def test_each_value_of_a_sweep_is_taken_as_its_kind(word, values):
    made = jobs(check_words("train", [*HERE, word], sweep=True))
    found = [OmegaConf.select(composed("train", job), word.partition("=")[0]) for job in made]
    assert repr([OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for v in found]) == repr(values)


def made(*words, command="train"):
    words = check_words(command, [*(HERE if command == "train" else []), *words], sweep=True)
    check_jobs(command, words)
    return jobs(words)


def test_a_word_with_an_effect_in_one_job_is_left_out_of_the_others():
    unguided, guided = made("guidance=none,classifier_free", "guidance.scale=4")
    assert job_of("train", tuple(unguided)).words == ("+experiment=digits", "guidance=none")
    assert job_of("train", tuple(guided)).words == tuple(guided) and not job_of("train", tuple(guided)).idle
    first, second = run_of(unguided), run_of(guided)
    assert first.words == ("+experiment=digits", "guidance=none", f"run_dir={first.folder}")
    assert "guidance.scale=4" in first.folder and "guidance.scale=4" in second.words


def test_an_option_and_a_part_of_a_group_are_left_out_as_well():
    words = ["checkpoint=x", "metrics=[fid],[bits_per_dim]", "sampler=heun", "likelihood={by: ode, probes: 3}"]
    scored, measured = made(*words, command="evaluate")
    assert job_of("evaluate", tuple(scored)).words == ("checkpoint=x", "metrics=[fid]", "sampler=heun")
    assert "sampler=heun" not in job_of("evaluate", tuple(measured)).words
    two = [*HERE, "held_out={every_steps: 0, split: test}"]
    assert job_of("train", tuple(two)).words == ("+experiment=digits", "held_out.every_steps=0")


@pytest.mark.parametrize(
    "words, message",
    [
        (["guidance=none", "guidance.scale=4", "seed=0,1"], "guidance.scale=4 has no effect: guidance=none"),
        (["levels.weight=one,min_snr", "max_nonfinite=3"], "max_nonfinite=3 has no effect: on_nonfinite=stop"),
    ],
)
def test_a_word_without_effect_in_any_job_is_refused(words, message):
    with pytest.raises(Refusal, match=message):
        made(*words)


def test_the_jobs_of_a_sweep_run_without_what_has_no_effect_in_them(call, digits, tmp_path):
    words = [f"data.root={digits}", "trainer.max_steps=1.0", "data.batch_size=2", "callbacks=none", "name=a"]
    words += ["model.multipliers=[1]", "model.attention_resolutions=[]", "held_out.every_steps=0"]
    status, output = call("train", "-m", *words, "levels.weight=one,min_snr", "levels.gamma=4")
    assert status == 0, output
    gammas = {}
    for path in (tmp_path / "runs/a").glob("*/config.yaml"):
        cfg = OmegaConf.load(path)
        gammas[cfg.levels.weight] = cfg.levels.gamma
        assert "levels.gamma=4" in path.parent.name and type(cfg.trainer.max_steps) is int
    assert gammas == {"one": OmegaConf.load("conf/levels/uniform.yaml").gamma, "min_snr": 4}


@pytest.mark.parametrize("name", ["train", "evaluate checkpoint=x", "sample checkpoint=x out=y", "lab task=errors"])
@pytest.mark.parametrize("key", ["trainer.threads", "trainer.devices"])
def test_a_variable_of_another_kind_is_refused_by_every_command(name, key, call, monkeypatch):
    monkeypatch.setenv("FOO", "many")
    command, *words = name.split()
    status, output = call(command, *words, f"{key}=${{oc.env:FOO}}")
    assert status == 2 and f"{key}=many" in output and "Traceback" not in output
