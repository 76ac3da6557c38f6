"""`python -m diffusion.lab`, each task at a small size: its tables, pictures, page and words; and what it refuses."""

import csv
import json
import re

import pytest
from conftest import inside

from diffusion.lab.tasks.ideas import IDEAS, ideas

FEW = {  # settings of each task that make it quick
    "forward": ["forward.frames=3", "forward.num_points=50"],
    "reverse": ["reverse.frames=3", "reverse.num_points=50", "reverse.num_steps=20"],
    "modes": ["modes.num_points=400", "modes.num_steps=60"],
    "errors": ["errors.num_steps=[5,10,40]"],
    "equivalence": ["equivalence.num_images=8", "equivalence.num_steps=10"],
}


def few(task, words):
    """The settings of a task that have an effect beside these words."""
    if task != "errors":
        return FEW[task]
    of_images = any(word.startswith("checkpoint=") and "images" in word for word in words)
    if of_images:
        return ["errors.times=6", "errors.num_images=12"]
    exact = not any(word.startswith(("checkpoint=", "toy=")) and word != "toy=gaussian" for word in words)
    measured = [] if exact else ["errors.times=6", "errors.num_points=60"]
    return [*FEW[task], *measured]


@pytest.fixture
def lab(call):
    """`lab("modes", *words)`: the command at a small size; (status, what it printed)."""
    return lambda task, *words: call("lab", f"task={task}", *few(task, words), *words)


@pytest.fixture(scope="module")
def points_run(tmp_path_factory):
    """A network that was trained on points for a few steps."""
    folder = tmp_path_factory.mktemp("points")
    words = ["+experiment=gmm", "trainer.max_steps=30", "data.num_points=2048", "data.batch_size=64", "run_dir=run"]
    assert inside("train", words, folder) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def images_run(tmp_path_factory, digits):
    """A network that was trained on digits for a few steps."""
    folder = tmp_path_factory.mktemp("images")
    words = ["trainer.max_steps=6", "callbacks=none", f"data.root={digits}", "run_dir=run", "data.batch_size=16"]
    assert inside("train", words, folder) == 0
    return folder / "run"


def rows(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def written(folder, task):
    """Names of the files of a task, each of them something."""
    assert all(path.stat().st_size > 30 for path in (folder / task).iterdir())
    return {path.name for path in (folder / task).iterdir()}


# ---- what each task leaves ----


def test_errors_of_a_gaussian(lab, tmp_path):
    status, out = lab("errors", "gaussian.fitted_on=200", "sampler.num_steps=10", "errors.num_steps=[5,20]")
    assert status == 0, out
    assert "dominates" in out and "The cheapest change" in out and "ddim: order" in out
    names = {f"{n}.csv" for n in ("initialisation", "orders", "parts", "steps", "training")} | {"page.json"}
    names |= {f"{n}.png" for n in ("initialisation", "orders", "steps", "training")}
    assert written(tmp_path / "lab", "errors") == names
    trained, exact = rows(tmp_path / "lab" / "errors" / "parts.csv")
    assert float(exact["training"]) < 1e-12 < float(trained["training"])
    for row in (trained, exact):
        parts = [float(row[name]) for name in ("initialisation", "training", "discretisation")]
        assert float(row["total"]) <= float(row["their sum"]) == pytest.approx(sum(parts))
    samplers = {row["sampler"] for row in rows(tmp_path / "lab" / "errors" / "orders.csv")}
    assert len(samplers) == 6 and "predictor_corrector corrector.norms=expected" in samplers
    page = (tmp_path / "lab" / "report.html").read_text()
    assert "Where the error comes from: gaussian" in page and "http" not in re.sub(r"http://www.w3.org\S*", "", page)
    assert "python -m diffusion.lab task=errors" in page and "diffusion/lab/gaussian.py" in page


def test_errors_on_ve_of_a_mixture_by_a_sampler_that_draws(lab, tmp_path):
    words = [
        "toy=modes",
        "schedule=ve_geometric",
        "sampler=ancestral",
        "sampler.num_steps=8",
        "samplers=[ddim,ancestral]",
    ]
    status, out = lab("errors", *words)
    assert status == 0, out
    (row,) = rows(tmp_path / "lab" / "errors" / "parts.csv")
    assert row["denoiser"] == "the exact denoiser" and float(row["training"]) == 0
    start = rows(tmp_path / "lab" / "errors" / "initialisation.csv")[-1]
    assert float(start["prior_std"]) ** 2 == pytest.approx(1 + float(start["sigma"]) ** 2)
    assert 0 < float(start["w2_low"]) < float(start["w2_high"])
    assert {r["sampler"] for r in rows(tmp_path / "lab" / "errors" / "orders.csv")} == {"ddim", "ancestral"}


def test_errors_of_a_network_of_points(lab, points_run, tmp_path):
    status, out = lab("errors", f"checkpoint={points_run}", "sampler.num_steps=8", "samplers=[ddim]")
    assert status == 0, out
    folder = points_run / "lab"
    assert "Training dominates" in out and "loss of v, quarter 1: excess" in out and not (tmp_path / "lab").exists()
    assert "quarters.csv" in written(folder, "errors") and len(rows(folder / "errors" / "quarters.csv")) == 4
    trained, exact = rows(folder / "errors" / "parts.csv")
    assert float(trained["training"]) > 0.1 and float(exact["training"]) == 0
    assert trained["discretisation"] == exact["discretisation"]


@pytest.mark.slow
def test_errors_of_a_model_of_images(lab, images_run, tmp_path):
    out_folder = tmp_path / "a b=c"
    words = [f"checkpoint={images_run}", f"out={out_folder}", "sampler.num_steps=4", "guidance=classifier_free"]
    status, out = lab("errors", *words)
    assert status == 0, out
    assert "on the scale of 0 to 255: initialisation" in out and "learned by heart" in out
    names = {"errors.csv", "refinement.csv", "settings.csv", "training.csv", "refinement.png", "training.png"}
    assert written(out_folder, "errors") == names | {"page.json"}
    found = {row["error"]: float(row["grey_levels"]) for row in rows(out_folder / "errors" / "errors.csv")}
    assert 0 <= found["training, at least"] <= found["training, at most"]
    assert [int(row["num_steps"]) for row in rows(out_folder / "errors" / "refinement.csv")] == [4, 8, 16]
    assert len(rows(out_folder / "errors" / "settings.csv")) == 10  # five spacings, of as many steps and of twice
    assert len(rows(out_folder / "errors" / "training.csv")) == 6


@pytest.mark.slow
def test_errors_of_a_model_are_the_same_again(lab, images_run):
    words = [f"checkpoint={images_run}", "sampler=ancestral", "sampler.num_steps=4"]
    found = []
    for out in ("one", "other"):
        assert lab("errors", *words, f"out={images_run / out}")[0] == 0
        tables = sorted((images_run / out / "errors").glob("*.csv"))
        found.append([(path.name, path.read_text()) for path in tables])
    assert found[0] == found[1] and len(found[0]) == 4


@pytest.mark.parametrize(
    "task, pictures",
    [
        ("forward", {"fields.png", "class_bits.png", "peaks.png", "space_time.png", "forward.gif"}),
        ("reverse", {"paths.png", "decided.png", "space_time.png", "reverse.gif"}),
        ("modes", {"modes.png", "rarest.png"}),
        ("equivalence", {"walks.png"}),
    ],
)
def test_the_other_tasks(task, pictures, lab, tmp_path):
    status, out = lab(task)
    assert status == 0, out
    tables = {"equivalence": {"losses.csv", "walks.csv"}}.get(task, {f"{task}.csv"})
    assert written(tmp_path / "lab", task) == pictures | tables | {"page.json"}
    assert str(tmp_path) not in (tmp_path / "lab" / "report.html").read_text()


def test_pages_of_all_tasks_stand_in_one_report(lab, tmp_path):
    assert lab("equivalence", "out=x")[0] == lab("modes", "out=x", "samplers=[ddim,langevin]")[0] == 0
    page = (tmp_path / "x" / "report.html").read_text()
    assert page.count('<section class="experiment"') == 2 and 'href="#modes"' in page
    kept = json.loads((tmp_path / "x" / "modes" / "page.json").read_text())
    assert kept["title"] == "Shares of modes: modes on vp_linear" and kept["html"] in page
    found = rows(tmp_path / "x" / "modes" / "modes.csv")
    assert {row["sampler"] for row in found} == {"ddim", "langevin"} and len(found) == 16
    assert all(float(row["low"]) <= float(row["share"]) <= float(row["high"]) for row in found)


def test_plain_langevin_is_told_from_the_others(lab, tmp_path):
    status, out = lab("modes", "modes.num_points=2000", "samplers=[ddim,'langevin step_size=1e-3']")
    assert status == 0 and "these give each class its weight: ddim." in out
    assert "These do not: langevin step_size=1e-3." in out


def test_equivalence_of_a_trained_network(lab, images_run, points_run):
    for run in (images_run, points_run):
        status, out = lab("equivalence", f"checkpoint={run}")
        assert status == 0 and "float64: VP and VE walks differ by at most" in out, out


def test_an_animation_moves_and_lasts(lab, tmp_path):
    from PIL import Image

    assert lab("forward")[0] == 0
    with Image.open(tmp_path / "lab" / "forward" / "forward.gif") as film:
        assert film.n_frames == 3 and film.info["loop"] == 0
        frames = []
        for k in range(3):
            film.seek(k)
            frames.append(film.convert("RGB").tobytes())
    assert len(set(frames)) == 3


# ---- ideas ----


def test_every_idea_names_functions_that_say_what_they_do():
    for told, shown in zip(IDEAS.values(), ideas(*IDEAS), strict=True):
        assert len(shown.functions) == len(told.functions) >= 1 and shown.equation and len(shown.text) > 40
        assert all(len(function.doc) > 40 and function.file.startswith("diffusion/") for function in shown.functions)


# ---- what is refused ----


@pytest.mark.parametrize(
    "words, message",
    [
        (["task=error"], "task=error must be one of equivalence, forward, reverse, modes, errors."),
        (["task=errors", "toy=ring"], "toy=ring must be one of modes, rings"),
        (["task=errors", "checkpoint=nowhere"], "checkpoint=nowhere does not exist. Give a run folder"),
        (["task=modes", "checkpoint=nowhere"], "checkpoint=nowhere is for task=errors and task=equivalence"),
        (
            ["task=errors", "gaussian.mean=[0.1]"],
            "gaussian.mean=[0.1] and gaussian.stds=[0.5, 0.1] must be as many numbers",
        ),
        (["task=errors", "gaussian.stds=[0.5,-1]"], "gaussian.stds=[0.5,-1] holds -1, which must be above 0"),
        (["task=modes", "modes.num_points=0"], "modes.num_points=0 must be at least"),
        (["task=modes", "modes.confidence=1"], "modes.confidence=1 is outside"),
        (["task=errors", "errors.num_steps=[]"], "errors.num_steps=[] is empty: give two or more numbers of steps"),
        (["task=errors", "errors.num_steps=[0,4]"], "errors.num_steps=[0,4]"),
        (
            ["task=forward", "forward.times=[0,2000]"],
            "forward.times=[0, 2000]: give times from 0 to schedule.num_timesteps",
        ),
        (["task=forward", "toy=gaussian", "gaussian.mean=[0.1]", "gaussian.stds=[1]"], "task=forward shows the plane"),
        (["task=errors", "toy=modes", "gaussian.fitted_on=100"], "gaussian.fitted_on=100 is for toy=gaussian."),
        (["task=errors", "gaussian.fitted_on=3"], "3 points are too few"),
        (
            ["task=errors", "toy=modes", "errors.num_steps=[20,30]"],
            "errors.num_steps=[20, 30]: each must be a multiple",
        ),
        (["task=errors", "toy=modes", "sampler=annealed_langevin"], "sampler.visits: walks on shared noise"),
        (["task=errors", "sampler.num_steps=2000"], "sampler.num_steps=2000 must be an integer from 1 to"),
        (["task=errors", "trainer.devices=2"], "the laboratory works in one process"),
        (["task=modes", "samplers=[dim]"], "samplers: Unknown sampler: dim. Did you mean ddim?"),
        (["task=modes", "samplers=['ddim et=0.5']"], "samplers: 'ddim et=0.5': Unknown setting: et. Did you mean eta?"),
        (["task=modes", "samplers=['ddim eta']"], "settings are key=value"),
        (["task=modes", "samplers=['ddim eta=']"], "settings are key=value"),
        (["task=modes", "samplers=['ddim eta=x']"], "samplers: 'ddim eta=x': sampler.eta=x is not a number"),
        (["task=modes", "samplers=['annealed_langevin visits=1.5']"], "visits=1.5 is not an integer"),
        (["task=modes", "samplers=['']"], "samplers=[''] is not a list of words"),
        (["task=modes", "samplers=['annealed_langevin visits=60']", "modes.num_steps=50"], "takes 60 steps at a level"),
        (["task=modes", "modes.num_points=100"], "modes.num_points=100: of the rarest class 5 samples or more"),
        (["task=modes", "toy=gaussian"], "task=modes: toy=gaussian has a single class"),
        (["task=errors", "samplers=[ddim,predictor_corrector]"], "give corrector.norms=expected"),
        (["task=errors", "sampler=predictor_corrector"], "give corrector.norms=expected"),
        (["task=errors", "toy=modes", "errors.num_steps=[20]"], "errors.num_steps=[20]: give two or more"),
        (
            ["task=errors", "samplers=['ddim spacing=quadratic clip_x0=true']"],
            "samplers: 'ddim spacing=quadratic clip_x0=true': spacing=quadratic has no effect: all samplers of the",
        ),
        (
            ["task=errors", "samplers=['heun max_calls=3']"],
            "max_calls=3 has no effect: errors.num_steps sets",
        ),
        (["task=modes", "samplers=['ddim num_steps=7']"], "num_steps=7 has no effect: modes.num_steps sets"),
        (["task=reverse", "samplers=['ddim clip_x0=false']"], "clip_x0=false has no effect: the denoiser is the exact"),
        (["task=modes", "samplers=[ancestral_learned]"], "'ancestral_learned': variance=learned needs a network that"),
        (["task=errors", "sampler=ancestral_learned"], "sampler: variance=learned needs a network that has learned it"),
        (["task=modes", "samplers=['ddim eta=2']"], "sampler.eta=2 is outside [0, 1]"),
        (["task=modes", "samplers=[]"], "samplers=[] is empty: give some of the group sampler"),
        (["task=reverse", "samplers=[langevin]"], "samplers: none of them goes from noise to data"),
        (["task=modes", "guidance=classifier_free"], "guidance=classifier_free has no effect: task=modes"),
        (["task=errors", "guidance=classifier_free"], "guidance.scale=2.0"),
    ],
)
def test_what_cannot_be_is_refused_by_name(words, message, call, tmp_path):
    status, out = call("lab", *words)
    assert status == 2 and message in out and "Traceback" not in out, out
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_a_checkpoint_and_a_toy_do_not_go_together(points_run, images_run, call, tmp_path):
    for words, message in (
        (["toy=modes", f"checkpoint={points_run}"], "toy=modes: with checkpoint="),
        ([f"checkpoint={images_run}", "errors.num_images=2"], "errors.num_images=2"),
        ([f"checkpoint={images_run}", "errors.split=test"], "errors.split=test: the data set has no such split"),
        ([f"checkpoint={images_run}", "sampler=ancestral_learned"], "sampler.variance=learned"),
        ([f"checkpoint={images_run}", "sampler=predictor_corrector"], "sampler.visits: walks on shared noise"),
    ):
        status, out = call("lab", "task=errors", *words)
        assert status == 2 and message in out, out
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ["task=errors", "schedule.num_timesteps=1", "sampler.num_steps=1"],
        ["task=errors", "toy=modes", "sampler.num_steps=1"],
        ["task=errors", "toy=gaussian", "gaussian.mean=[0.1]", "gaussian.stds=[0.5]", "schedule=sub_vp"],
        ["task=errors", "gaussian.mean=[0.1,0,0]", "gaussian.stds=[0.5,1,2]", "samplers=[ancestral]"],
        ["task=equivalence", "equivalence.num_steps=1"],
        [
            "task=equivalence",
            "schedule.num_timesteps=6",
        ],  # fewer than the steps of the sampler, which it has no use for
    ],
)
def test_what_is_small_or_odd_is_measured_all_the_same(words, lab):
    task = words[0].partition("=")[2]
    status, out = lab(task, *words[1:], *(["errors.num_steps=[2,4]"] if task == "errors" else []))
    assert status == 0 and "Report: lab/report.html" in out, out


def test_help_says_what_it_does(command):
    done = command("lab", "--help", check=0)
    assert "python -m diffusion.lab task=errors" in done.stdout and "schedule" in done.stdout
