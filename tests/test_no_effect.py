"""A setting that has no effect is refused and never recorded as one; so is a value of another kind than it has."""

import functools
import json
import re

import pytest
import torch
from conftest import inside, rows
from omegaconf import OmegaConf, open_dict

from diffusion.build.prepare import model_words
from diffusion.build.sampling import chosen_sampler
from diffusion.config.check import check
from diffusion.config.compose import Typed, composed_of_options
from diffusion.config.composer import groups
from diffusion.config.effect import TABLE, matches, refuse_idle
from diffusion.config.values import _keys, check_word, fit_all, kind_at
from diffusion.config.words import parse, plain
from diffusion.errors import Refusal
from diffusion.models.resolutions import nearest_resolutions, resolutions
from diffusion.models.unet import UNet
from diffusion.settings import ANY

EVALUATE, IMAGES = ["checkpoint=x"], ["images=x", "reference=y"]
SWEEP, BITS = [*EVALUATE, "task=sweep"], [*EVALUATE, "metrics=[bits_per_dim]"]
IDLE = [  # (command, words that hold, a word without effect, what the refusal says of it)
    ("sample", ["checkpoint=x", "out=y"], "guidance.scale=4.0",
     "guidance.scale=4.0 has no effect: guidance=none. Give guidance=classifier_free guidance.scale=4.0"),
    ("evaluate", EVALUATE, "guidance.scale=0", "guidance=none"),
    ("train", ["guidance=none"], "guidance.scale=4", "guidance=none"),
    ("lab", ["task=errors"], "guidance.scale=3", "guidance=none"),
    ("sample", ["checkpoint=x", "out=y", "sampler=ancestral"], "sampler.spacing=quadratic", "every level is visited"),
    ("train", ["sampler.num_steps=1000"], "sampler.spacing=trailing", "sampler.num_steps=1000"),
    ("sample", ["checkpoint=x", "out=y", "sampler=predictor_corrector", "sampler.visits=1"],
     "sampler.corrector.snr=0.2", "sampler.visits=1"),
    ("sample", ["checkpoint=x", "out=y"], "sampler.rho=3",
     "sampler.spacing=linear. Give sampler.spacing=karras sampler.rho=3"),
    ("sample", ["checkpoint=x", "out=y", "sampler=ancestral"], "sampler.rho=3", "sampler.spacing=linear"),
    ("evaluate", SWEEP, "sampler.rho=3", "sampler.spacing=linear"),
    ("sample", ["checkpoint=x", "out=y", "sampler.max_calls=9"], "sampler.num_steps=7", "sampler.max_calls=9"),
    ("sample", ["checkpoint=x", "out=y"], "sampler.rho=3", "Give sampler.spacing=karras sampler.rho=3"),
    ("train", ["sampler.spacing=[900,1]"], "sampler.num_steps=7", "gives the times themselves"),
    ("train", ["callbacks=none"], "metrics=[is]", "callbacks=none"),
    ("train", ["callbacks=none"], "extractor.weights=x", "callbacks=none"),
    ("train", ["callbacks.enabled=false"], "callbacks.grid.num_images=4", "callbacks=none"),
    ("train", ["metrics=[]"], "callbacks.score.num_images=20", "metrics=[] scores nothing"),
    ("train", [], "callbacks.score.during.num_images=20", "callbacks.score.every_steps=0"),
    ("train", [], "model.fourier_scale=2", "Give model.time_embedding=fourier model.fourier_scale=2"),
    ("train", [], "levels.gamma=4", "Give levels.weight=min_snr levels.gamma=4"),
    ("train", [], "data.remote.attempts=3", "data.root=data/digits"),
    ("train", [], "data.max_bad_share=0.5", "data.on_bad_sample=skip"),
    ("train", [], "data.rule.crop=none", "how diffusion.prepare makes the set"),
    ("train", ["+experiment=gmm"], "data.root=x", "nothing is on disk"),
    ("train", [], "max_nonfinite=3", "on_nonfinite=stop"),
    ("train", ["held_out.every_steps=0"], "held_out.num_images=3", "held_out.every_steps=0 measures nothing"),
    ("train", [], "held_out.batch_size=3", "data=digits has no split validation or test"),
    ("evaluate", IMAGES, "num_images=4", "images=x"),
    ("evaluate", IMAGES, "data.root=z", "a checkpoint's own data"),
    ("evaluate", EVALUATE, "images_split=test", "images=PATH is not given"),
    ("lab", ["task=errors"], "data.root=z", "checkpoint=PATH is not given"),
    ("benchmark", ["task=loader"], "digests.rounds=3", "task=loader"),
    ("evaluate", IMAGES, "sampler=ancestral", "nothing is sampled"),
    ("evaluate", IMAGES, "guidance=classifier_free", "nothing is sampled"),
    ("evaluate", IMAGES, "ema=false", "nothing is sampled"),
    ("evaluate", IMAGES, "seed=3", "nothing is sampled"),
    ("evaluate", BITS, "guidance=classifier_free", "metrics=[bits_per_dim]"),
    ("evaluate", BITS, "num_images=4", "metrics=[bits_per_dim]"),
    ("evaluate", BITS, "neighbours=4", "metrics=[bits_per_dim]"),
    ("evaluate", EVALUATE, "likelihood.num_images=4", "metrics=[fid,is]"),
    ("evaluate", [*SWEEP, "metrics=[fid]"], "likelihood.num_images=4", "task=sweep"),
    ("evaluate", BITS, "likelihood.probes=3", "likelihood.by=bound"),
    ("evaluate", BITS, "likelihood.start=0.2", "likelihood.by=bound"),
    ("evaluate", [*BITS, "likelihood.by=ode", "likelihood.probes=0"], "likelihood.probe=gaussian", "the exact trace"),
    ("evaluate", [*BITS, "likelihood.by=ode"], "likelihood.variance=large", "likelihood.by=ode"),
    ("evaluate", IMAGES, "images_split=test", "images=x is not a data set"),
    ("evaluate", IMAGES, "split=test", "reference=y is not a data set"),
    ("evaluate", EVALUATE, "sweep.eta=[0]", "task=score"),
    ("evaluate", SWEEP, "sampler.eta=1", "sweep.eta"),
    ("evaluate", SWEEP, "sampler=ancestral", "sweep.eta"),
    ("evaluate", SWEEP, "neighbours=4", "task=sweep"),
    ("evaluate", SWEEP, "metrics=[kid]", "task=sweep"),
    ("lab", ["task=errors"], "equivalence.num_images=8", "task=errors"),
    ("lab", ["task=errors"], "forward.frames=8", "task=errors"),
    ("lab", ["task=errors"], "reverse.frames=8", "task=errors"),
    ("lab", ["task=errors"], "modes.num_points=8", "task=errors"),
    ("lab", ["task=modes"], "errors.num_points=8", "task=modes"),
    ("lab", ["task=modes"], "sampler=ancestral", "task=modes"),
    ("lab", ["task=forward"], "samplers=[ddim]", "task=forward"),
    ("lab", ["task=errors", "checkpoint=x"], "schedule=sub_vp", "checkpoint=x"),
    ("lab", ["task=errors", "checkpoint=x"], "schedule.num_timesteps=10", "checkpoint=x"),
    ("lab", ["task=errors"], "ema=false", "checkpoint=PATH is not given"),
    ("lab", ["task=errors"], "errors.num_images=8", "checkpoint=PATH is not given"),
    ("lab", ["task=errors", "checkpoint=x"], "gaussian.fitted_on=8", "checkpoint=x"),
    ("lab", ["task=modes", "toy=gaussian"], "gaussian.fitted_on=8", "task=modes"),
    ("lab", ["task=errors", "toy=modes"], "gaussian.mean=[0,1]", "toy=gaussian"),
    ("lab", ["task=errors"], "errors.num_points=8", "exactly"),
    ("report", ["run_dir=x"], "out=y", "run_dir=x"),
    ("report", [], "seed=3", "nothing is drawn"),
    ("prepare", ["task=verify", "out=x"], "source=y", "task=verify"),
    ("prepare", ["task=verify", "out=x"], "image_size=8", "task=verify"),
    ("prepare", ["source=digits"], "image_size=16", "source=digits"),
    ("prepare", ["source=x"], "max_bad_share=0.2", "on_bad_sample=error"),
    ("prepare", ["source=x"], "crop=adm", "without image_size"),
    ("benchmark", ["task=overhead"], "gpu_check.steps=200", "task=overhead"),
    ("benchmark", ["task=overhead"], "loader.rounds=2", "task=overhead"),
    ("benchmark", ["task=loader"], "overhead.rounds=2", "task=loader"),
    ("benchmark", ["task=loader", "loader.root=x"], "loader.image_size=64", "loader.root=x"),
]  # fmt: skip


@functools.cache
def given(command, *words):
    """(configuration, what is typed) of a command line, as Hydra would compose it, which takes a moment each time: here
    settings are put into what is composed once for the same options."""
    if command == "train" and "experiment" not in str(words):
        words = ("+experiment=digits", *words)
    options = tuple(word for word in words if word.lstrip("+").partition("=")[0] in groups())
    reference = composed_of_options(command, options)
    cfg = reference.copy()
    with open_dict(cfg):
        del cfg["hydra"]
    for word in words:
        if word not in options:
            override = parse(check_word(parse(word), reference, command) or word)
            OmegaConf.update(cfg, override.key_or_group, plain(override.value()))
    OmegaConf.resolve(cfg)
    fit_all(cfg, command, typed := Typed(command, words))
    return cfg, typed


def checked(command, words, table=None):
    """The configuration of a command line, looked at as the command does; Refusal if it does not hold."""
    cfg, typed = given(command, *words)
    if table is None:
        check(cfg, typed)
    else:
        refuse_idle(cfg, typed, table)
    return cfg


@pytest.mark.parametrize("command, words, idle, why", IDLE, ids=[f"{case[0]} {case[2]}" for case in IDLE])
def test_a_setting_without_effect_is_refused(command, words, idle, why):
    checked(command, words)
    with pytest.raises(Refusal) as refused:
        checked(command, [*words, idle])
    assert str(refused.value).startswith(f"{idle} has no effect: ") and why in str(refused.value)


@pytest.mark.parametrize("idle", TABLE, ids=[f"{idle.commands} {idle.why}" for idle in TABLE])
def test_each_row_of_the_table_is_met(idle):
    def met(command, words):
        try:
            checked(command, words, [idle])
        except Refusal:
            return True

    tried = [case for case in IDLE if matches(case[2].partition("=")[0], idle.keys.split())]
    assert any(met(command, [*words, word]) for command, words, word, _ in tried)


@pytest.mark.parametrize(
    "command, words",
    [
        ("sample", ["checkpoint=x", "out=y", "guidance.scale=1.0"]),
        ("sample", ["checkpoint=x", "out=y", "sampler=ancestral", "sampler.spacing=linear"]),
        ("sample", ["checkpoint=x", "out=y", "guidance=classifier_free", "guidance.scale=1"]),
        ("train", ["data.max_bad_share=0.01", "callbacks.score.during.num_steps=null"]),
        ("train", ["callbacks=none", "metrics=[fid,is]", "callbacks=default", "trainer.timeout=5"]),
        ("evaluate", [*IMAGES, "num_images=50000", "sampler=ddim"]),
        ("evaluate", [*EVALUATE, "metrics=[fid,bits_per_dim]", "guidance=classifier_free", "likelihood.num_images=3"]),
        ("evaluate", [*SWEEP, "sampler.spacing=quadratic", "metrics=[fid]"]),
        ("evaluate", [*SWEEP, "sampler.spacing=karras", "sampler.rho=3"]),
        ("sample", ["checkpoint=x", "out=y", "sampler.spacing=karras", "sampler.rho=3"]),
        ("train", ["sampler.rho=7"]),
        ("report", ["runs=x", "out=y"]),
    ],
)
def test_what_has_an_effect_or_holds_anyway_is_taken(command, words):
    assert checked(command, words)  # not refused


HERE = {"num_steps": "the list has its own"}


@pytest.mark.parametrize(
    "words, refused",
    [
        (
            "heun num_steps=7",
            "samplers: 'heun num_steps=7': num_steps=7 has no effect: the list has its own. Leave",
        ),
        ("ddim rho=3", "samplers: 'ddim rho=3': sampler.rho=3 has no effect: sampler.spacing=linear"),
        (
            "predictor_corrector visits=1 corrector.snr=1",
            "sampler.corrector.snr=1 has no effect: with",
        ),
    ],
)
def test_a_setting_without_effect_in_the_words_of_a_sampler_is_refused(words, refused):
    with pytest.raises(Refusal) as found:
        chosen_sampler(words, "samplers", HERE)
    assert refused in str(found.value)


@pytest.mark.parametrize("words", ["heun num_steps=25", "ddim spacing=karras rho=3", "ddim eta=0.5 rho=7.0"])
def test_one_that_has_an_effect_or_holds_anyway_is_taken_there(words):
    made, plan = chosen_sampler(words, "samplers", HERE)
    assert callable(made) and plan.rho == (3 if "rho=3" in words else 7)


def test_a_scale_of_guidance_that_no_one_has_typed_is_no_other_than_that_of_what_is_done():
    cfg = given("sample", "checkpoint=x", "out=y")[0].copy()
    cfg.guidance.scale = 4.0
    with pytest.raises(Refusal, match="guidance.scale=4.0 has no effect"):
        check(cfg)


def test_guidance_is_recorded_of_samples_alone(digits, tmp_path, call):
    """Bits per dimension know no guidance; a command without effect leaves nothing behind."""
    words = ["trainer.max_steps=1", "data.batch_size=4", "callbacks=none", f"data.root={digits}", "run_dir=run"]
    words += ["model.multipliers=[1]", "model.attention_resolutions=[]", "schedule.num_timesteps=20"]
    assert inside("train", [*words, "sampler.num_steps=2", "schedule.beta_end=0.6"], tmp_path) == 0
    quick = ["checkpoint=run", "num_images=12", "sampler.num_steps=2", "out=rows.jsonl"]
    status, out = call("evaluate", *quick, "metrics=[fid]", "guidance.scale=4")
    assert status == 2 and "guidance.scale=4 has no effect: guidance=none." in out
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    mixed = ["metrics=[fid,bits_per_dim]", "likelihood.num_images=2", "guidance=classifier_free", "guidance.scale=3"]
    assert call("evaluate", *quick, *mixed)[0] == 0
    found = rows(tmp_path / "rows.jsonl")
    assert found["fid"]["guidance_scale"] == 3 and "guidance" not in json.dumps(found["bits_per_dim"])
    assert (
        call("evaluate", "checkpoint=run", "metrics=[bits_per_dim]", "likelihood.num_images=2", "out=b.jsonl")[0] == 0
    )


# ---- members of lists ----


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["model.attention_resolutions=[3]"],
            "model.attention_resolutions=[3]: 3 is not a resolution of this network.",
        ),
        (["model.attention_resolutions=[4,16]"], "the resolutions are 8, 4."),
        (
            ["model.attention_resolutions=[4,4]"],
            "model.attention_resolutions=[4,4]: a resolution occurs more than once",
        ),
        (["metrics=[fid,fid]"], "metrics=[fid,fid] has fid more than once"),
        (["optimizer.betas=[0.9]"], "optimizer.betas=[0.9] is not a list of 2 numbers"),
        (["model.image_size=16"], "model.image_size=16, but data=digits has 8"),
        (["callbacks=none", "callbacks.enabled=true"], "callbacks.enabled=true: callbacks=none has nothing to enable"),
    ],
)
def test_members_that_match_nothing_or_repeat_are_refused(words, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        checked("train", words)


def test_the_network_itself_refuses_attention_at_a_size_that_does_not_occur():
    with pytest.raises(ValueError, match=r"attention_resolutions=\[3\]: 3 is not .* resolutions are 8, 4\."):
        UNet(8, width=32, multipliers=(1, 2), attention_resolutions=[3])
    with pytest.raises(ValueError, match="more than once"):
        UNet(8, width=32, multipliers=(1, 2), attention_resolutions=[4, 4])
    with torch.device("meta"):
        count = lambda *sizes: sum(p.numel() for p in UNet(8, 1, 32, (1, 2), sizes).parameters())  # noqa: E731
    assert count(4) > count() and count(8, 4) > count(4)


@pytest.mark.parametrize("experiment", groups()["experiment"])
def test_every_experiment_is_sound(experiment):
    assert checked("train", [f"+experiment={experiment}"]).name == experiment


@pytest.mark.parametrize("size", [*range(8, 70), 96, 100, 127, 128, 255, 256, 300, 512])
def test_the_printed_command_has_a_sound_network_for_every_size(size):
    words = ["+experiment=images", f"data.image_size={size}", *model_words(size)]
    model = checked("train", words).model
    assert model.attention_resolutions and set(model.attention_resolutions) <= set(
        resolutions(size, len(model.multipliers))
    )


def test_the_network_of_a_size_that_fits_is_that_of_conf():
    for size, option in ((8, "unet_8"), (32, "unet_32"), (64, "unet_64"), (128, "unet_256"), (256, "unet_256")):
        assert model_words(size) == [f"model={option}"]
    assert model_words(24) == ["model=unet_32", "model.attention_resolutions=[12]"]
    assert model_words(9) == ["model=unet_8", "model.multipliers=[1]", "model.attention_resolutions=[9]"]


def test_the_nearest_resolution_is_that_of_the_nearest_ratio():
    assert nearest_resolutions(24, 4, [16]) == [12] and nearest_resolutions(28, 2, [4]) == [14]
    assert nearest_resolutions(32, 4, [16, 8]) == [16, 8] and nearest_resolutions(9, 1, [4, 2]) == [9]


# ---- kinds of values ----


@pytest.mark.parametrize(
    "command, word, message",
    [
        ("train", "paper.fid=abc", "paper.fid=abc is not a number"),
        ("train", "paper={fid: abc}", "paper.fid=abc is not a number"),
        ("train", "paper={fod: 3}", "Unknown setting: paper.fod. Did you mean paper.fid?"),
        ("train", "sampler.num_steps=abc", "sampler.num_steps=abc is not an integer"),
        ("train", "trainer.threads=x", "trainer.threads=x is not an integer"),
        ("train", "trainer.threads=true", "trainer.threads=true is not an integer"),
        ("train", "data.digest=[a]", "data.digest=[a] is not text"),
        ("train", "optimizer.lr=nan", "optimizer.lr=nan is not a finite number"),
        ("train", "optimizer.betas=[a,b]", "optimizer.betas=[a,b] is not a list of 2 numbers"),
        ("train", "model.multipliers=[1,2.5]", "model.multipliers=[1,2.5] is not a list of integers"),
        ("train", "metrics={a: 1}", "metrics={a: 1} is not a list of words"),
        ("train", "run_dir=", "run_dir= is empty"),
        ("train", "callbacks.grid=null", "callbacks.grid=null"),
        ("train", "~trainer.max_steps", "~trainer.max_steps: this setting cannot be removed"),
        ("train", "~sampler.num_steps", "~sampler.num_steps: this setting cannot be removed"),
        ("evaluate", "likelihood.split=[3]", "likelihood.split=[3] is not text"),
        ("evaluate", "likelihood.num_images=many", "likelihood.num_images=many is not an integer"),
        ("lab", "forward.times=[a]", "forward.times=[a] is not a list of numbers"),
        ("prepare", "image_size=big", "image_size=big is not an integer"),
        ("train", "seed=${name}", "seed=digits is not an integer"),
    ],
)
def test_a_value_of_another_kind_is_refused(command, word, message):
    with pytest.raises(Refusal, match=re.escape(message)):
        checked(command, [word])


def test_a_value_is_taken_as_its_kind_whichever_way_it_is_written():
    cfg = checked(
        "train", ["paper.fid=3", "trainer.threads=2.0", "data.digest=12", "metrics=fid", "trainer.precision=32"]
    )
    assert (cfg.paper.fid, cfg.trainer.threads, cfg.data.digest, cfg.metrics) == (3, 2, "12", ["fid"])
    assert type(cfg.trainer.threads) is int and cfg.trainer.precision == "32"


COMPOSED = [
    *((command, []) for command in ("sample", "evaluate", "lab", "prepare", "report", "benchmark")),
    *(("train", [f"+experiment={name}"]) for name in groups()["experiment"]),
    *((("train", ["+experiment=digits", f"{group}={option}"]))
      for group in ("schedule", "objective", "levels", "sampler", "guidance", "optimizer", "lr_schedule", "model",
                    "trainer", "extractor", "logger")
      for option in groups()[group]),
]  # fmt: skip


@pytest.mark.parametrize(
    "command, words", COMPOSED, ids=lambda value: " ".join(value) if isinstance(value, list) else value
)
def test_every_setting_in_conf_is_declared_by_the_class_that_takes_it(command, words):
    cfg = composed_of_options(command, tuple(words))
    undeclared = {key for key in _keys(cfg) if kind_at(key, cfg, command) == ANY}
    assert undeclared == set()


def leaves(content, prefix):
    for name, value in content.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
