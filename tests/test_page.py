"""The report of a run and the table of many: complete, self-contained, escaped, and quiet about what is missing."""

import base64
import csv
import io
import math
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from diffusion.page import difference, not_comparable, shown, write_report, write_table
from diffusion.page.metrics_csv import MAX_POINTS, Metrics, thinned
from diffusion.page.training_curves import quartile_names
from diffusion.progress import duration
from diffusion.report import collect
from diffusion.runs.folder import RunFolder
from diffusion.runs.recorded import Recorded
from diffusion.training.meter import MetricsCsv

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {
    "name": "rings",
    "seed": 0,
    "data": {"name": "ring images", "image_size": 8, "channels": 1, "num_classes": 10, "batch_size": 64},
    "model": {"_target_": "diffusion.models.unet.UNet", "num_classes": 10, "multipliers": [1, 2]},
    "schedule": {"_target_": "diffusion.process.schedule.vp_linear", "num_timesteps": 1000},
    "objective": {"_target_": "diffusion.objective.Simple", "_partial_": True, "prediction": "epsilon"},
    "ema": {"decay": 0.998, "warmup": True},
    "trainer": {"max_steps": 200},
    "callbacks": {"grid": None},
}


def result(metric="FID", value=3.31, **more):
    row = {"metric": metric, "name": metric.rpartition("-")[2].lower(), "value": value, "reference": 3.17}
    row |= {"num_images": 50_000, "num_reference": 50_000, "sampler": "ddim", "num_steps": 50, "nfe": 100.0, "seed": 7}
    row |= {"step": 200, "weights": "ema", "extractor": "inception", "commit": "c0ffee+"}
    return row | {"versions": {"torch": "2.15.0"}} | more


def run(path, config=CONFIG, rows=20, results=(), grids=(), every=10):
    """A run folder as training leaves it: 64 images a step, 640 images/s."""
    folder = RunFolder(path)
    folder.path.mkdir(parents=True)
    if config:
        folder.write_config(Recorded(config, "here"))
    metrics = MetricsCsv(folder.metrics_path)
    for step in range(every, every * rows + 1, every):
        loss = {f"train/loss_q{q}": 4.0**-q * (1 + 1 / step) for q in (1, 2, 3, 4)}
        row = {"train/loss": sum(loss.values()) / 4, **loss, "train/grad_norm": 0.5 + 1 / step}
        metrics.log_metrics(row | {"train/lr": 2e-4 * min(1, step / 50), "train/images_per_second": 640.0}, step)
    if results:
        folder.add_results(list(results))
    folder.samples.mkdir()
    for step in grids:
        Image.new("RGB", (40, 20), (step % 256, 0, 0)).save(folder.samples / f"step_{step:08d}.png")
    return folder


class Page(HTMLParser):
    """Text, pictures and addresses of a page; fails on a tag that is closed without having been opened."""

    VOID = {"meta", "img", "br", "link"}

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.images, self.addresses, self.tags = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(attrs["src"])
        self.addresses += [v for k, v in attrs.items() if k in ("src", "srcset", "href", "xlink:href", "data")]

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [v for k, v in attrs if k in ("href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)


def read(path):
    text = path.read_text()
    page = Page(text)
    assert all(a.startswith(("data:image/", "#")) for a in page.addresses), "something is loaded from elsewhere"
    assert "@import" not in text and "url(http" not in text
    return page


def test_the_report_answers_in_the_order_a_person_asks(tmp_path):
    scores = [result(), result("IS", 9.2, is_std=0.1, reference=9.46)]
    folder = run(tmp_path / "rings", results=scores, grids=(100, 200))
    assert write_report(folder) == folder.report_path
    page = read(folder.report_path)
    headings = ["Samples", "Scores", "Curves", "Samples over training", "Settings", "Versions"]
    places = [folder.report_path.read_text().index(f"<h2>{h}</h2>") for h in headings]
    assert places == sorted(places)
    for words in (
        "A conditional UNet that predicts epsilon, trained for 200 of 200 steps on ring images",
        "8×8 pixels, 1 channel, 10 classes",
        "decay 0.998 after a ramp",
        "images seen 12,800",  # 200 steps of 64
        "images/s 640",
        "time a step 100 ms",  # 64 / 640 s
        "training time 20 s",  # 200 of them
        "at step 200",
        "FID ↓ 3.31 3.17 +0.14 yes 50,000 50,000 ddim 50 100 7 200 ema inception",
        "IS ↑ 9.2 ± 0.1 9.46 -0.26 yes",
        "q1: cleanest quarter of noise levels, t = 1–250",
        "q4: noisiest quarter, t = 751–1000",
        "loss, log axis",
        "optimizer step",
        "images/s",
        "multipliers [1, 2]",
        "grid null",
        "commit c0ffee+",
        "torch 2.15.0",
    ):
        assert words in page.text, words
    assert page.tags.count("svg") == 4  # loss, gradient norm, learning rate, speed
    assert "cannot be compared" not in page.text and "_partial_" not in page.text


def test_pictures_are_those_of_the_folder_newest_first_and_a_dozen_over_training(tmp_path):
    folder = run(tmp_path / "rings", grids=range(10, 310, 10))
    page = read(write_report(folder))
    pixels = []
    for address in page.images:
        kind, _, content = address.partition(";base64,")
        assert kind == "data:image/png"
        pixels.append(Image.open(io.BytesIO(base64.b64decode(content))).getpixel((0, 0))[0])
    newest, *strip = pixels
    assert newest == strip[-1] == 300 % 256 and strip[0] == 10 and len(strip) == 12
    gaps = [(b - a) % 256 for a, b in zip(strip, strip[1:], strict=False)]
    assert set(gaps) <= {20, 30}  # 30 grids, 12 shown: as even as it goes


def test_a_large_grid_becomes_small_in_the_strip_and_a_damaged_one_is_named(tmp_path):
    folder = run(tmp_path / "rings")
    for step in (10, 20):
        Image.effect_noise((800, 400), 90).save(folder.samples / f"step_{step:08d}.png")
    (folder.samples / "step_00000030.png").write_bytes((folder.samples / "step_00000020.png").read_bytes()[:5000])
    page = read(write_report(folder))
    sizes = [Image.open(io.BytesIO(base64.b64decode(a.partition(",")[2]))).size for a in page.images]
    assert sizes == [(800, 400), (320, 160), (320, 160)]
    assert "at step 20" in page.text and "samples/step_00000030.png cannot be read" in page.text


@pytest.mark.parametrize(
    "row, verdict",
    [
        (result(), None),
        (result(num_images=49_999), "too few images"),
        (result("digits-FID", extractor="digits"), "extractor"),
        (result("digits-IS", extractor="digits", num_images=500), "extractor, too few images"),
        ({"metric": "bits/dim", "name": "bits_per_dim", "value": 3.7, "num_images": 10_000}, None),
    ],
)
def test_a_score_is_comparable_with_published_ones_only_from_inception_and_50000_images(tmp_path, row, verdict):
    assert not_comparable(row) == verdict
    table = read(write_table([row | {"run": "rings"}], tmp_path / "table.html", "Scores"))
    complaints = [word for word in ("extractor", "few") if word in (verdict or "")]
    assert table.text.count("cannot be compared with published") == len(complaints)
    for page in (table, read(write_report(run(tmp_path / "rings", rows=1, results=[row])))):
        assert f"no: {verdict}" in page.text if verdict else "no:" not in page.text


def test_scores_of_the_newest_step_come_first_and_make_a_curve_with_the_earlier_ones(tmp_path):
    folder = run(tmp_path / "rings", results=[result(value=20.5, step=100), result(value=4.5, step=200)])
    metrics = MetricsCsv(folder.metrics_path)
    metrics.log_metrics({"eval/fid": 20.5}, 100)
    assert read(write_report(folder)).tags.count("svg") == 4  # one value is a row of the table and no curve
    metrics.log_metrics({"eval/fid": 4.5}, 200)
    page = read(write_report(folder))
    assert page.tags.count("svg") == 5
    newest, earlier, old = map(page.text.index, ("4.5 3.17 +1.33", "earlier steps (1)", "20.5 3.17 +17.33"))
    assert newest < earlier < old


def test_an_empty_folder_has_a_report_and_no_folder_has_none(tmp_path):
    (tmp_path / "new").mkdir()
    page = read(write_report(RunFolder(tmp_path / "new")))
    for quiet in ("No samples", "No scores", "no rows yet", "no config.yaml", "No versions"):
        assert quiet in page.text
    assert "svg" not in page.tags and page.images == []
    with pytest.raises(ValueError, match="run_dir=.*folder not found"):
        write_report(RunFolder(tmp_path / "absent"))


@pytest.mark.parametrize("rows", [1, 2, 1500])
def test_curves_of_any_length_are_drawn(tmp_path, rows):
    folder = RunFolder(tmp_path / "rings")
    folder.write_config(Recorded(CONFIG, "here"))
    lines = (f"{s},{1 / s},{0.1 / s},,inf,{3 / s},2.5e-4,0\n" for s in range(1, rows + 1))
    names = "step,train/loss,train/loss_q1,train/loss_q2,train/loss_q3,train/grad_norm,train/lr,train/images_per_second"
    folder.metrics_path.write_text(names + "\n" + "".join(lines) + f"{rows + 1},0.")  # the last cut off by a kill
    page = read(write_report(folder))
    assert page.tags.count("svg") == 4
    assert "time a step" not in page.text  # of a rate of 0
    assert f"in {rows:,} row{'s' * (rows > 1)} of metrics.csv" in page.text
    assert ("Lines are means of about 6.2 rows" in page.text) == (rows == 1500)


def test_only_the_finite_values_of_a_column_make_its_curve(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,a,b\n5,1.5,nan\n10,inf,\n15,2.5,-3\n20,oops,4\n25,1\n")
    metrics = Metrics.read(tmp_path / "metrics.csv")
    assert metrics.steps == [5, 10, 15, 20]
    assert metrics.curve("a") == ([5, 15], [1.5, 2.5]) and metrics.curve("b") == ([15, 20], [-3.0, 4.0])
    assert metrics.curve("absent") == ([], [])
    assert metrics.notes == [
        "Not drawn: 1 damaged line of metrics.csv.",
        "Not drawn: values that are no finite numbers, in 3 rows of metrics.csv.",
    ]


def test_a_thinned_curve_keeps_its_mean_and_every_extreme():
    x = list(range(16_000))
    y = [math.sin(i / 900) for i in x]
    y[0], y[7777], y[-1] = -40.0, 50.0, -60.0  # spikes, also at the ends
    few = thinned(x, y, 160)
    assert all(len(column) == 160 for column in few) and few.x == sorted(few.x)
    assert math.fsum(few.mean) / 160 == pytest.approx(math.fsum(y) / 16_000)  # equal stretches of 100
    assert few.low[0] == -40.0 and few.high[77] == 50.0 and few.low[-1] == -60.0
    assert all(low <= mean <= high for _, low, mean, high in zip(*few, strict=True))
    assert thinned(x[:MAX_POINTS], y[:MAX_POINTS]) == (x[:MAX_POINTS], *[y[:MAX_POINTS]] * 3)  # nothing to thin


@pytest.mark.parametrize("num_timesteps", [1000, 10, 7, 4])
def test_quartiles_are_named_by_the_times_that_training_counts_in_them(num_timesteps):
    members = {q: [t for t in range(1, num_timesteps + 1) if (t - 1) * 4 // num_timesteps == q] for q in range(4)}
    for q, name in enumerate(quartile_names(num_timesteps)):
        assert name.endswith(f"t = {members[q][0]}–{members[q][-1]}")


def test_names_from_files_cannot_become_markup(tmp_path):
    evil = "<script>alert(1)</script>$x^{"
    config = CONFIG | {"name": evil, "data": CONFIG["data"] | {"name": evil, evil: evil}}
    folder = run(tmp_path / "rings", config, results=[result(evil, extractor=evil, sampler=evil, commit=evil)])
    metrics = MetricsCsv(folder.metrics_path)
    for step in (10, 20):
        metrics.log_metrics({f"eval/{evil}": 1.0 * step}, step)
    page = read(write_report(folder))
    assert "script" not in page.tags and "script" not in "".join(page.addresses)
    assert page.text.count("alert(1)") >= 8  # shown as what it is: title, summary, settings, table, curve
    rows = [result(evil) | {"run": evil, "report": None}]
    assert Page(write_table(rows, tmp_path / "t.html", evil).read_text()).tags.count("script") == 1  # the sorting


@pytest.mark.parametrize(
    "value, words",
    [(None, "–"), (True, "yes"), (12345, "12,345"), (100.0, "100"), (3.14159, "3.142"), (0.00012, "0.00012")],
)
def test_values_are_written_for_a_person(value, words):
    assert shown(value) == words


@pytest.mark.parametrize(
    "seconds, words",
    [(0.0821, "82.1 ms"), (2.5, "2.50 s"), (12.4, "12 s"), (185, "3 min 5 s"), (7800, "2 h 10 min"), (59.7, "60 s")],
)
def test_durations_are_written_for_a_person(seconds, words):
    assert duration(seconds) == words


def test_no_difference_without_a_published_value():
    assert difference(result(value=3.5, reference=3.0)) == 0.5
    assert difference(result(reference=None)) is None


def report(*words, cwd):
    command, environment = [sys.executable, "-m", "diffusion.report", *words], os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=120)


def test_the_command_puts_all_scores_in_one_table_best_first(tmp_path):
    runs = tmp_path / "my runs, [old]"
    first = run(runs / "b c=1", results=[result(value=5.5), result("IS", 8.0)])
    run(runs / "sweep" / "a,1", results=[result(value=4.5), result("IS", 9.0, num_images=500)])
    run(runs / "unscored")
    write_report(first)
    done = report(f"runs={runs}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with open(runs / "results.csv", newline="") as f:
        table = list(csv.DictReader(f))
    order = [(r["run"], r["metric"], r["value"]) for r in table]
    a, b = "sweep/a,1", "b c=1"
    assert order == [(a, "FID", "4.5"), (b, "FID", "5.5"), (a, "IS", "9.0"), (b, "IS", "8.0")]
    assert [r["not_comparable"] for r in table] == ["", "", "too few images", ""]
    assert float(table[0]["difference"]) == pytest.approx(4.5 - 3.17) and table[0]["versions.torch"] == "2.15.0"
    page = Page((runs / "results.html").read_text())
    assert page.addresses == ["b%20c%3D1/report.html"] * 2  # the one run with a report, linked as seen from the table
    assert page.text.index("sweep/a,1 FID ↓ 4.5") < page.text.index("b c=1 FID ↓ 5.5") < page.text.index("IS ↑ 9")
    assert {p.name for p in runs.iterdir()} == {"b c=1", "sweep", "unscored", "results.csv", "results.html"}
    assert {p.name for p in tmp_path.iterdir()} == {runs.name}


def test_out_is_a_folder_of_its_own_and_links_lead_back(tmp_path):
    folder = run(tmp_path / "runs" / "one", results=[result()])
    write_report(folder)
    assert collect(tmp_path / "runs", tmp_path / "elsewhere" / "deep")[0]["report"] == "../../runs/one/report.html"
    assert collect(folder.path, folder.path)[0]["run"] == "one"  # a single run is a table of one


def test_the_command_makes_one_report_again(tmp_path):
    folder = run(tmp_path / "a run, = 1", results=[result()], grids=(200,))
    done = report(f"run_dir={folder.path}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "FID ↓ 3.31" in read(folder.report_path).text and str(folder.report_path) in done.stdout
    assert {p.name for p in tmp_path.iterdir()} == {folder.path.name}


@pytest.mark.parametrize(
    "words, complaint",
    [
        ("runs=absent", "runs=absent: folder not found"),
        ("runs=empty", "runs=empty: no results found"),
        ("runs=unscored", "runs=unscored: no results found"),
        ("run_dir=empty", "run_dir=empty is not a run folder"),
        ("runs=scored out=a_file/below", "a_file is a file, so nothing can be kept there"),
        ("sort=value", "Unknown setting: sort."),
    ],
)
def test_the_command_refuses_in_one_message(tmp_path, words, complaint):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a_file").write_text("")
    run(tmp_path / "unscored" / "a", rows=1)
    run(tmp_path / "scored" / "a", rows=1, results=[result()])
    before = sorted(tmp_path.rglob("*"))
    done = report(*words.split(), cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and complaint in done.stderr
    assert "Traceback" not in done.stderr and sorted(tmp_path.rglob("*")) == before


def test_the_page_needs_no_torch():
    code = "import sys, diffusion.page, diffusion.report; print({'torch', 'matplotlib', 'jinja2'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout == "set()\n", done.stdout + done.stderr
