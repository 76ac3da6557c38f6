"""Values of another kind or out of range: exit status 2, and the message has the key, the value and what is allowed."""

import shlex
from typing import Literal

import pytest

from diffusion.config.words import shown
from diffusion.errors import Refusal
from diffusion.process.schedule import ve_geometric
from diffusion.samplers.ddim import DDIM
from diffusion.scoring.recipe import Plan
from diffusion.settings import Count, settings

X = "sample checkpoint=x out=y"
E = "evaluate checkpoint=x"
# The words of a command, and what the message says beside the setting, which is the last word.
WRONG = {
    # lists and single values
    f"{X} labels=3,7": "a list is written in brackets: 'labels=[3,7]'",
    "train metrics=fid,is": "metrics=[fid,is]",
    f"{E} task=sweep sweep.eta=0,1": "sweep.eta=[0,1]",
    "train ema.decays=0.5,0.6": "ema.decays=[0.5,0.6]",
    "lab task=errors samplers=ddim,heun": "samplers=[ddim,heun]",
    "train seed=0,1": "several values make a sweep, which needs the flag -m",
    "train sampler=ddim,heun": "several values make a sweep, which needs the flag -m",
    "train model.multipliers=[a]": "a list of integers, as [1,2]",
    "train model.multipliers=[]": "give one for each level",
    "train model.multipliers=[1.5,2]": "a list of integers",
    "train model.multipliers=[1,true]": "a list of integers",
    "train model.multipliers=null": "a value is needed, a list of integers",
    "train model.attention_resolutions=[x]": "a list of integers",
    "train model.attention_resolutions=[3]": "resolutions are 8, 4",
    "train optimizer.betas=[]": "a list of 2 numbers",
    "train optimizer.betas=[0.9,0.99,0.999]": "a list of 2 numbers",
    "train optimizer.betas=[0.9,1.0]": "two numbers in [0, 1)",
    "train optimizer.betas=0.9": "a list of 2 numbers",
    "train optimizer.betas=[a,b]": "a list of 2 numbers",
    "train ema.decays=[0.9,0.9]": "Give it once",
    "train ema.decays=[0.9,x]": "a list of numbers",
    "train sampler.spacing=[a]": "linear, quadratic, trailing, lambda, karras, or a list of numbers",
    "train sampler.spacing=[1,2,3]": "falling times",
    "train sampler.spacing=cubic": "linear, quadratic, trailing, lambda, karras, or a list of numbers",
    f"{E} task=sweep sweep.num_steps=0x10": "a list of integers",
    f"{E} task=sweep sweep.num_steps=[0]": "must be at least 1",
    f"{E} task=sweep sweep.eta=[2]": "outside [0, 1]",
    f"{X} labels=[a]": "a list of integers",
    f"{X} labels=[-1]": "from 0 on",
    f"{X} labels=[1.5]": "a list of integers",
    "lab task=forward toy=gaussian gaussian.stds=[-1,1]": "must be above 0",
    "prepare source=x background=[1,2]": "one of white, black",
    # integers
    "train data.lanes=true": "an integer or null",
    "train trainer.threads=1.5": "an integer or null",
    "train callbacks.score.during.num_steps=1.5": "an integer or null",
    "train callbacks.score.num_images=1": "fid needs at least 2 images, here are 1",
    "train callbacks.grid.every_steps=-1": "must be at least 0",
    "train seed=-1": "outside [0, 9223372036854775807]",
    "train seed=true": "an integer; the default is seed=0",
    "train seed=[1]": "an integer",
    "train data.batch_size=0": "must be at least 1",
    "train data.batch_size=null": "a value is needed, an integer",
    "train data.batch_size={a: 1}": "an integer",
    "train data.num_workers=9999": "outside [0, 1024]",
    "train trainer.max_steps=1e4.5": "an integer",
    "train trainer.devices=0": "must be at least 1",
    "train model.width=33": "multiple of 32",
    "train model.num_classes=-1": "must be at least 0",
    "train log_every=1.5": "an integer; the default is log_every=50",
    "train held_out.num_images=-2": "must be at least 1",
    "prepare source=x image_size=0": "outside [1, 8192]",
    "prepare source=x channels=2": "one of 1, 3",
    "prepare source=x format=jpeg quality=101": "outside [1, 100]",
    "benchmark task=loader loader.batch_size=0": "must be at least 1",
    # numbers
    "train optimizer.lr=0": "must be above 0",
    "train optimizer.lr=inf": "a finite number",
    "train optimizer.lr=nan": "a finite number",
    "train ema.decay=1": "outside [0, 1)",
    "train ema.decay=true": "a number; the default is ema.decay=0.998",
    "train save.every_minutes=-1": "must be at least 0",
    "train data.remote.timeout=-3": "must be above 0",
    "train data.max_bad_share=1.5": "outside [0, 1]",
    "train schedule.beta_start=2": "outside (0, 1)",
    "train objective.label_dropout=-0.1": "outside [0, 1]",
    "train levels=log_normal levels.std=0": "must be above 0",
    "train guidance.scale=big": "a number; the default is guidance.scale=2.0",
    "train paper.fid=good": "a number or null",
    f"{X} ema=2": "outside [0, 1)",
    f"{X} ema=maybe": "false, true, or a number",
    # words, and what is on or off
    "train data.cache=disk": "one of auto, memory, none",
    "train data.cache=1": "one of auto, memory, none",
    "train data.flip=2": "true or false",
    "train deterministic=1": "true or false",
    "train on_nonfinite=go": "one of stop, skip",
    "train trainer.precision=fp8": "one of auto, 32, bf16-mixed",
    "train objective.prediction=noise": "one of epsilon, x0, v",
    "train levels.weight=max": "one of one, min_snr",
    "train model.time_embedding=fourierr": "one of positional, fourier",
    "train extractor.name=a-b": "a word of letters and digits",
    f"{E} task=swep": "one of score, sweep",
    f"{E} likelihood.by=sum": "one of bound, ode",
    # missing values, and settings that cannot be removed
    "sample checkpoint=x out=null": "a value is needed, text",
    "train name=null": "a value is needed, text",
    "train name=[a]": "text; the default is name=digits",
    "train run_dir=": "is empty: give text; the default is run_dir=runs/digits",
    "train data.root=null": "a value is needed, a folder or an address",
    "train callbacks.grid=null": "cannot be switched off",
    "train callbacks=null": "Options of callbacks: default, none",
    "prepare ~source": "Give it another value: source=VALUE",
    "train ~data.batch_size": "Give it another value: data.batch_size=VALUE",
}


def call_of(line, call):
    """Its status and what it says; `shlex` leaves what is in quotes or braces whole."""
    name, *words = shlex.split(line.replace("{a: 1}", "'{a: 1}'"))
    return (*call(name, *words), words)


@pytest.mark.parametrize("line", WRONG)
def test_a_value_of_another_kind_is_refused_with_what_is_allowed(line, call, tmp_path):
    status, output, words = call_of(line, call)
    key, equals, value = words[-1].partition("=")
    assert status == 2 and output.startswith("error: ") and len(output.splitlines()) == 1, output
    assert key in output and value in output and WRONG[line] in output, output
    assert output.rstrip().endswith((".", "?")) and "Traceback" not in output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "word, found",
    [
        ("model.image_size=${oc.env:HOME}", "an integer"),
        ("data.batch_size=${name}", "an integer"),
        ("optimizer.lr=${run_dir}", "a number"),
        ("data.flip=${seed}", "true or false"),
        ("optimizer.betas=${model.multipliers}", "two numbers in [0, 1)"),
    ],
)
def test_the_value_of_an_interpolation_is_looked_at_too(word, found, call, tmp_path):
    status, output = call("train", word)
    assert status == 2 and word.partition("=")[0] in output and found in output, output
    assert not list(tmp_path.iterdir())


def test_values_are_shown_as_they_are_typed():
    assert [shown(v) for v in (None, True, [1, None], "")] == ["null", "true", "[1,null]", "''"]


@settings("a")
def passed(
    number: Count = 1, part: float = 0.5, text: str = "", words: Literal["x", "32"] = "x", members: list[int] = ()
) -> tuple:
    return number, part, text, words, members


def test_arguments_arrive_in_the_form_of_their_kind():
    found = passed(2.0, 3, 4, 32, members=5.0)
    assert repr(found) == "(2, 3, '4', '32', [5])"
    members = (1, 2)
    assert passed(members=members)[-1] is members and passed(members=(1.0, 2))[-1] == (1, 2)
    with pytest.raises(Refusal, match=r"^a\.number=2\.5 is not an integer\.$"):
        passed(2.5)
    assert ve_geometric(num_timesteps=2.0).num_timesteps == 2
    with pytest.raises(ValueError, match=r"^sampler\.spacing=\[5\]"):
        Plan(spacing=5).times(DDIM(ve_geometric(num_timesteps=2)))


def test_a_number_of_the_environment_needs_to_be_decoded(call, monkeypatch):
    monkeypatch.setenv("FOO", "2")
    status, output = call("train", "trainer.threads=${oc.env:FOO}")
    decoded = "trainer.threads='${oc.decode:${oc.env:NAME}}'"
    assert status == 2 and f"{decoded}, in quotes, decodes it" in output
    status, output = call("train", decoded.replace("NAME", "FOO"), "run_dir=/dev/null/x")
    assert status == 2 and "/dev/null/x" in output and "threads" not in output
