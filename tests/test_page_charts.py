"""Charts, bound, pictures and sweeps in a report: each line at the height of its number, and whole without any."""

import csv
import math
import re

import pytest
from PIL import Image
from test_page import CONFIG, Page, read, result, run

from diffusion.metrics.published.papers import DDIM_CIFAR10, DDPM_RATE_DISTORTION, SIGMA_HAT
from diffusion.page import sweep_figure, sweep_table_text, write_report, write_table
from diffusion.page.chart import Chart, Level, Series, inline
from diffusion.page.likelihood import COLUMNS, read_bound, spread
from diffusion.page.metrics_csv import MAX_POINTS
from diffusion.page.sweep import sweep_chart
from diffusion.report import order
from diffusion.runs.folder import RunFolder
from diffusion.training.meter import MetricsCsv

CIFAR10 = CONFIG | {
    "data": CONFIG["data"] | {"name": "cifar10", "image_size": 32},
    "model": {"_target_": "UNet", "num_classes": 0},
}


def points(svg, tag):
    """The corners of the first path in a group, in the picture's units; y grows downwards."""
    group = re.search(rf'<g id="{re.escape(tag)}">.*?</g>', svg, re.DOTALL)
    assert group, f"no group {tag} among {re.findall('<g id=.([^>]*).>', svg)}"
    path = re.search(r' d="([^"]*)"', group[0])[1]
    return [tuple(map(float, pair)) for pair in re.findall(r"[ML] ?(-?[\d.]+) (-?[\d.]+)", path)]


def scale(pixels, values, log=False):
    """Pixel of a value, from two corners of a curve whose values are known."""
    place = math.log if log else float
    (a, b), (x, y) = (pixels[0], pixels[-1]), (place(values[0]), place(values[-1]))
    return lambda value: a + (place(value) - x) * (b - a) / (y - x)


def heights(svg, tag):
    return [y for _, y in points(svg, tag)]


def off(point, corners):
    """How far a point is from a line, given by its corners."""

    def from_stretch(a, b):
        along = (b[0] - a[0], b[1] - a[1])
        length = along[0] ** 2 + along[1] ** 2
        share = ((point[0] - a[0]) * along[0] + (point[1] - a[1]) * along[1]) / length if length else 0.0
        share = min(1.0, max(0.0, share))
        return math.dist(point, (a[0] + share * along[0], a[1] + share * along[1]))

    return min(from_stretch(a, b) for a, b in zip(corners, corners[1:], strict=False))


# ---- charts ----


@pytest.mark.parametrize("log", [False, True], ids=["linear", "log"])
def test_levels_and_bands_lie_at_their_values(log):
    values = [40.0, 9.0, 4.0]
    levels = [Level("paper", "published", 3.17, tag="published"), Level("q1", "real", 6.0, 1.5, tag="real")]
    svg = inline(Chart("FID ↓", "FID", [Series("q4", "", [1, 2, 3], values, tag="curve")], levels, log=log))["svg"]
    at = scale(heights(svg, "fid-curve"), values, log)
    assert heights(svg, "fid-curve")[1] == pytest.approx(at(9.0), abs=0.01)
    assert heights(svg, "fid-published") == pytest.approx([at(3.17)] * 2, abs=0.01)
    assert heights(svg, "fid-real") == pytest.approx([at(6.0)] * 2, abs=0.01)
    band = heights(svg, "fid-real-band")
    assert (min(band), max(band)) == pytest.approx((at(7.5), at(4.5)), abs=0.01)


def test_a_logarithmic_axis_makes_a_power_a_straight_line():
    x = [1, 3, 10, 200, 1000]
    series = [Series("q1", "", x, [5 / v**2 for v in x], tag="power")]
    found = points(inline(Chart("Power", "y", series, log=True, x_log=True))["svg"], "power-power")
    (x0, y0), (x1, y1) = found[0], found[-1]
    assert all(y == pytest.approx(y0 + (x - x0) * (y1 - y0) / (x1 - x0), abs=0.02) for x, y in found)


def test_bars_are_as_high_as_their_values():
    svg = inline(Chart("By class", "FID", [Series("q4", "", [0, 1, 2], [10.0, 5.0, 0.0], kind="bars", tag="bars")]))[
        "svg"
    ]
    tall, half, none = (heights(svg, f"by-class-bars-{i}") for i in range(3))
    span = lambda y: max(y) - min(y)  # noqa: E731
    assert span(tall) == pytest.approx(2 * span(half), rel=1e-3) and span(none) == pytest.approx(0, abs=1e-6)


def test_a_chart_without_points_is_none_and_colours_are_the_pages():
    assert inline(Chart("Empty", "y", [Series("q1", "", [], [])], [Level("paper", "published", 1.0)])) is None
    svg = inline(Chart("One", "y", [Series(c, c, [1], [1.0]) for c in ("ink", "q1", "paper")]))["svg"]
    assert "#0102" not in svg and all(f"var(--{name})" in svg for name in ("ink", "q1", "warn"))


# ---- scores over training ----


def scored(path, config=CONFIG, **fields):
    """A run whose FID was 12, 6 and 4 at three steps."""
    steps, values = (100, 200, 300), (12.0, 6.0, 4.0)
    folder = run(path, config, results=[result(value=v, step=s, **fields) for s, v in zip(steps, values, strict=True)])
    metrics = MetricsCsv(folder.metrics_path)
    for step, value in zip(steps, values, strict=True):
        metrics.log_metrics({"eval/fid": value}, step)
    text = write_report(folder).read_text()
    read(folder.report_path)
    return text


def test_the_curve_of_scores_is_read_against_the_paper_and_against_real_images(tmp_path):
    text = scored(tmp_path / "a", real_value=2.0, real_std=0.5)
    at = scale(heights(text, "fid-curve"), (12.0, 4.0))
    assert heights(text, "fid-published") == pytest.approx([at(3.17)] * 2, abs=0.01)
    band = heights(text, "fid-real-band")
    assert (min(band), max(band)) == pytest.approx((at(2.5), at(1.5)), abs=0.01)
    assert "published: 3.17, 50,000 images" in text
    assert "real images against real ones: 2 ± 0.5, 50,000 images" in text


def test_the_published_value_comes_from_the_configuration_where_the_scores_have_none(tmp_path):
    text = scored(tmp_path / "a", CONFIG | {"paper": {"fid": 2.5}}, reference=None)
    at = scale(heights(text, "fid-curve"), (12.0, 4.0))
    assert heights(text, "fid-published") == pytest.approx([at(2.5)] * 2, abs=0.01)
    assert "-published" not in scored(tmp_path / "b", reference=None)


def test_scores_by_class_are_bars_in_the_order_of_the_classes(tmp_path):
    folder = run(tmp_path / "a", results=[result(per_class=[8.0, 4.0, None, 2.0])])
    text = write_report(folder).read_text()
    high = [max(y) - min(y) for y in (heights(text, f"fid-by-class-bars-{i}") for i in range(3))]
    assert high == pytest.approx([high[0], high[0] / 2, high[0] / 4], rel=1e-3)


def test_names_of_groups_are_given_once_in_a_page(tmp_path):
    text = scored(tmp_path / "a", real_value=2.0, real_std=0.5, per_class=[1.0, 2.0])
    names = re.findall(r'<g id="([^"]*)"', text)
    assert len(names) == len(set(names)) >= 5
    assert {f"fid-{name}" for name in ("curve", "published", "real", "real-band")} <= set(names)


# ---- the tables of the papers ----


def cifar10(**more):
    return result(data="cifar10", sampler="ancestral", variance="large", num_steps=1000, split="train") | more


def test_scores_stand_inside_the_papers_tables(tmp_path):
    rows = [cifar10(), cifar10(metric="IS", name="is", value=9.4, is_std=0.1)]
    page = read(write_report(run(tmp_path / "a", CIFAR10, results=rows)))
    after = page.text.partition("Against the papers")[2]
    assert after.index("DDPM, L_simple 9.46±0.11 3.17 5.24") < after.index("9.40±0.10 (-0.06) 3.31 (+0.14)")
    assert "Table 2" in after  # epsilon and L_simple are what its configuration says
    assert "Not recorded with the scores: rounding." in after and "Not as in the papers" not in after
    page = read(write_report(run(tmp_path / "b", CIFAR10, results=[cifar10(num_images=2000, weights="raw")])))
    assert "Not as in the papers: 2,000 images where" in page.text and "Raw weights where" in page.text


def test_what_the_configuration_says_counts_for_all_samples_of_the_model_and_for_no_images_of_files(tmp_path):
    conditional = CIFAR10 | {"model": {"_target_": "UNet", "num_classes": 10}}
    page = read(write_report(run(tmp_path / "a", conditional, results=[cifar10()])))
    assert "A model that is told the class" in page.text and "(+0.14)" not in page.text
    of_path = cifar10(data="data/cifar10")  # `evaluate reference=data/cifar10`
    page = read(write_report(run(tmp_path / "b", conditional, results=[of_path])))
    assert "A model that is told the class" in page.text and "(+0.14)" not in page.text
    page = read(write_report(run(tmp_path / "c", conditional, results=[cifar10(images="others.zip")])))
    assert "told the class" not in page.text and "(+0.14)" in page.text


def test_scores_without_a_place_are_given_a_reason(tmp_path):
    rows = [result(name, extractor="digits", data="digits") for name in ("digits-FID", "digits-IS")]
    page = read(write_report(run(tmp_path / "a", results=rows)))
    assert page.text.count("Not comparable with published scores: digits-FID, digits-IS, as") == 1


# ---- the bound ----


def write_bound(folder, terms, step=300, columns=COLUMNS, end=""):
    """likelihood/bound_step_*.csv of a run."""
    path = folder.path / "likelihood" / f"bound_step_{step:08d}.csv"
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(terms)
        f.write(end)
    return path


def published_terms():
    """A bound of 1,000 terms that passes through every point of DDPM's Table 4."""
    known = {1001 - n.of["reverse_steps"]: [f.value for f in n.figures] for n in DDPM_RATE_DISTORTION.lines}
    terms, rate, rmse = [], 0.0, 68.0
    for t in range(1000, 0, -1):
        rate, rmse = known.get(t, (rate, rmse))
        terms.append(
            {"t": t, "bits": 4 / t**2, "epsilon_mse": 1 / t, "x0_mse": t / 1000, "rate": rate, "rmse_255": rmse}
        )
    return terms


def test_the_terms_of_the_bound_are_drawn_and_held_against_the_paper(tmp_path):
    folder = run(tmp_path / "a", CIFAR10)
    write_bound(folder, published_terms())
    text = write_report(folder).read_text()
    page = read(folder.report_path)
    found = points(text, "bound-by-noise-level-bits")
    (x0, y0), (x1, y1) = found[0], found[-1]  # 4 / t^2: straight where both axes are logarithmic
    assert all(y == pytest.approx(y0 + (x - x0) * (y1 - y0) / (x1 - x0), abs=0.05) for x, y in found)
    rings, curve = points(text, "rate-and-distortion-published"), points(text, "rate-and-distortion-curve")
    assert len(rings) == 10
    assert rings[0] == pytest.approx(curve[0], abs=0.01)  # t = 1: all steps done
    assert all(off(ring, curve) < 0.5 for ring in rings)
    assert "error-by-noise-level-x0" in text and "error-by-noise-level-epsilon" in text
    assert "at step 300, term by term" in page.text
    assert page.text.count("(+0.00000)") == 20  # ten times, rate and distortion


@pytest.mark.parametrize(
    "last, told, departure",
    [
        ({"split": "train"}, False, None),
        ({"split": "test"}, True, None),
        ({"split": "test", "weights": "raw"}, True, "Raw weights where the papers score their moving average"),
    ],
)
def test_the_terms_are_of_the_last_bound_that_was_measured(last, told, departure, tmp_path):
    """Each measurement writes the same file; what the flow has measured writes none."""
    bits = {"metric": "bits/dim", "name": "bits_per_dim", "likelihood": "bound", "step": 300, "data": "cifar10"}
    bits |= {"value": 3.9, "num_images": 10_000, "split": "test", "weights": "ema"}
    rows = [bits | {"likelihood": "ode"}, bits, bits | last, bits | {"likelihood": "ode"}]
    folder = run(tmp_path / "a", CIFAR10, results=rows)
    write_bound(folder, published_terms())
    page = read(write_report(folder)).text
    assert ("Rate and distortion beside the paper's" in page) == told
    after = page.partition("Rate and distortion beside the paper's")[2]
    assert ("Not as in the papers" in after) == (departure is not None) and (departure or "") in after


def test_other_data_and_other_numbers_of_levels_have_no_published_points(tmp_path):
    folder = run(tmp_path / "rings")
    write_bound(folder, published_terms())
    assert "rate-and-distortion-published" not in write_report(folder).read_text()
    folder = run(tmp_path / "short", CIFAR10)
    write_bound(folder, published_terms()[-100:])
    text = write_report(folder).read_text()
    assert "rate-and-distortion-published" in text and "beside the paper's" not in text


def test_the_newest_bound_that_has_terms_is_read_and_damage_is_left_out(tmp_path):
    folder = run(tmp_path / "a")
    likelihood = folder.path / "likelihood"
    assert read_bound(likelihood) is None
    write_bound(folder, published_terms(), step=100)
    write_bound(folder, published_terms()[:3], step=200, end="4,oops,nan,,1e-3\n5,0.")  # cut off by a kill
    (likelihood / "bound_step_00000400.csv").write_bytes(b"\xff\x00no table")
    (likelihood / "bound_step_00000300.csv").write_text("")
    (likelihood / "bound_step_old.csv").write_text("t\n1\n")
    bound = read_bound(likelihood)
    assert bound.step == 200 and [term["t"] for term in bound.terms] == [4.0, 5.0, 998.0, 999.0, 1000.0]
    assert bound.curve("t", "bits")[0] == [998.0, 999.0, 1000.0]  # the 0. of the last line is not positive
    read(write_report(folder))


@pytest.mark.parametrize("missing", COLUMNS[1:])
def test_a_bound_without_one_of_its_columns_is_drawn_without_it(tmp_path, missing):
    folder = run(tmp_path / "a", CIFAR10)
    write_bound(folder, published_terms(), columns=[c for c in COLUMNS if c != missing])
    assert "at step 300, term by term" in read(write_report(folder)).text


@pytest.mark.parametrize("number", [1, 2, MAX_POINTS, MAX_POINTS + 1, 4000])
def test_a_curve_over_log_t_keeps_its_ends(number):
    x = [float(t) for t in range(1, number + 1)]
    few, same = spread(x, x)
    assert few == same and few[0] == 1 and few[-1] == number and len(few) <= MAX_POINTS
    assert few == sorted(set(few)) and few[: min(10, number)] == x[:10]  # where log t is wide, every term


# ---- pictures ----


def test_film_progress_and_neighbours_are_shown_the_newest_of_each(tmp_path):
    folder = run(tmp_path / "a", grids=(100,))
    places = {"samples/film_step_": "From noise to image", "evaluations/neighbours_": "Nearest neighbours"}
    places["likelihood/progressive_step_"] = "Likelihood"
    text = read(write_report(folder)).text
    assert not any(heading in text for heading in places.values()) and text.count("at step 100") == 1
    for i, stem in enumerate(places):
        for step in (90, 300):
            path = folder.path / f"{stem}{step:08d}.png"
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (30 + i, 20), (step % 256, 0, 0)).save(path)
        (folder.path / f"{stem}00000400.png").write_bytes(path.read_bytes()[:40])  # the newest is damaged
    page = read(write_report(folder))
    assert all(heading in page.text for heading in places.values())
    assert len(page.images) == 4 and page.text.count("at step 300") == 2
    assert all(f"{stem}00000400.png cannot be read" in page.text for stem in places)


# ---- sweeps ----


def sweep_rows(data="cifar10", factor=1.0):
    """Rows that repeat DDIM's Table 1, up to a factor, as evaluations make them."""
    rows = []
    for line in DDIM_CIFAR10.lines:
        for column, figure in zip(DDIM_CIFAR10.columns, line.figures, strict=True):
            eta = line.of["eta"]
            kind = (
                {"sampler": "ancestral", "variance": "large"} if eta == SIGMA_HAT else {"sampler": "ddim", "eta": eta}
            )
            row = {"data": data, "num_steps": column.steps, "nfe": column.steps, "fid": factor * figure.value}
            rows.append(row | kind | {"num_images": 50_000, "spacing": "quadratic", "clip_x0": eta == SIGMA_HAT})
    return rows


def as_words(rows, path):
    """The same rows through a CSV file."""
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, list(dict.fromkeys(k for row in rows for k in row)), restval="")
        writer.writeheader()
        writer.writerows(rows)
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def test_a_sweep_that_repeats_the_paper_lies_on_its_points():
    chart = sweep_chart(sweep_rows())
    svg = inline(chart)["svg"]
    for i in range(5):
        mine, rings = (points(svg, f"fid-over-network-calls-{kind}-{i}") for kind in ("run", "published"))
        assert len(mine) == 5 and all(math.dist(a, b) < 0.01 for a, b in zip(mine, rings, strict=True))
    x = [x for x, _ in mine]
    assert (x[3] - x[0]) == pytest.approx(x[4] - x[3], abs=0.02)  # 10 to 100 is as far as 100 to 1,000
    assert "Song et al. 2021 (DDIM" in chart.note


def test_a_sweep_beside_the_paper_has_the_shape_of_its_table(tmp_path):
    rows = sweep_rows(factor=2.0)
    text = sweep_table_text(rows)
    lines = text.splitlines()
    assert lines[0] == "FID on cifar10; in brackets: Song et al. 2021 (DDIM, arXiv:2010.02502), Table 1"
    assert lines[1].split() == "10 steps 20 steps 50 steps 100 steps 1,000 steps".split()
    assert lines[2].split() == "η = 0 26.72 [13.36] 13.68 [6.84] 9.34 [4.67] 8.32 [4.16] 8.08 [4.04]".split()
    assert lines[6].split()[:3] == [SIGMA_HAT, "734.86", "[367.43]"] and lines[6].endswith("  6.34 [3.17]")
    assert len(lines) == 7  # nothing was done otherwise
    assert sweep_table_text(as_words(rows, tmp_path / "sweep.csv")) == text
    few = sweep_table_text([row | {"num_images": 2000, "spacing": "linear"} for row in rows])
    assert "  - 2,000 images where the papers score 50,000" in few
    assert "Table 1: sampler.spacing=quadratic on this set, here linear" in few


def test_a_sweep_of_other_data_stands_alone():
    rows = sweep_rows(data="digits")
    text, chart = sweep_table_text(rows), sweep_chart(rows)
    assert "[" not in text and text.startswith("FID on digits\n") and "Not as" not in text
    assert chart.note == "" and [s.tag for s in chart.series] == [f"run-{i}" for i in range(5)]
    one = [{"eta": "0.3", "num_steps": "7", "fid": "5.5", "nfe": ""}]
    assert sweep_table_text(one).split() == "FID 7 steps η = 0.3 5.50".split()


def test_samplers_of_one_class_are_lines_of_their_own(tmp_path):
    """By their words; a row of a former version has none."""
    names = {"heun": "heun", "heun clip_x0=false": "heun", "ddim eta=0.5 spacing=karras": "ddim", "": "ddim"}
    rows = [
        {"words": words, "sampler": sampler, "eta": 0.5 if sampler == "ddim" else "", "num_steps": steps, "nfe": steps,
         "fid": 10 * k + steps / 100, "data": "cifar10"}
        for k, (words, sampler) in enumerate(names.items()) for steps in (10, 20)
    ]  # fmt: skip
    lines = sweep_table_text(rows).splitlines()[2:6]
    starts = ["η = 0.5", "ddim eta=0.5 spacing=karras", "heun ", "heun clip_x0=false"]
    assert len(lines) == 4 and all(line.startswith(start) for line, start in zip(lines, starts, strict=True))
    assert [line.split()[-2 if "[" in line else -1] for line in lines] == ["30.20", "20.20", "0.20", "10.20"]
    assert "30.10 [16.66]" in lines[0] and "20.10 [16.66]" in lines[1]
    chart = sweep_chart(rows)
    assert len([s for s in chart.series if s.tag.startswith("run-")]) == 4
    assert {s.tag for s in chart.series if s.tag.startswith("published-")} == {"published-0", "published-1"}
    former = [{k: v for k, v in row.items() if k != "words"} for row in rows[:2]]
    assert sweep_table_text(former).splitlines()[2].startswith("heun ")


def test_rows_without_a_score_are_left_out_and_of_two_the_later_counts(tmp_path):
    rows = [{"eta": 0, "num_steps": 10, "fid": v, "nfe": 10} for v in (9.0, 8.0, "", "nan", "oops")]
    rows += [{"eta": "", "num_steps": 10, "fid": 1.0}, {"eta": 0, "fid": 2.0}, {}]
    assert sweep_table_text(rows).split() == "FID 10 steps η = 0 8.00".split()
    assert sweep_table_text([]) == sweep_table_text(rows[2:]) == "" and sweep_chart(rows[2:]) is None
    with pytest.raises(ValueError, match="sweep.png: no row of the sweep has a FID"):
        sweep_figure([], tmp_path / "sweep.png")
    assert not any(tmp_path.iterdir())


def test_the_figure_of_a_sweep_is_a_picture_file(tmp_path):
    path = sweep_figure(sweep_rows(factor=2.0), tmp_path / "deep" / "sweep.png")
    with Image.open(path) as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
        assert picture.format == "PNG" and picture.width > 800
    assert {(0x2F, 0x62, 0xC4), (0x1B, 0x9E, 0x5A), (0x0F, 0x8F, 0xA6), (0x8C, 0x3F, 0xA8)} <= colours


@pytest.mark.parametrize("place", ["sweep.csv", "evaluations/sweep.csv"])
def test_a_sweep_in_the_run_folder_is_in_its_report(tmp_path, place):
    folder = run(tmp_path / "a", CIFAR10)
    (folder.path / "evaluations").mkdir()
    as_words(sweep_rows(factor=2.0), folder.path / place)
    page = read(write_report(folder))
    assert "Sampling in fewer steps" in page.text and "26.72 [13.36]" in page.text
    assert "fid-over-network-calls-published-4" in folder.report_path.read_text()


# ---- many runs ----


def test_the_table_of_many_runs_knows_the_better_side_of_every_metric(tmp_path):
    names = {"KID": "kid", "precision": "precision", "recall": "recall", "bits/dim": "bits_per_dim"}
    rows = []
    for metric, name in names.items():
        for run_name, value in (("low", 0.25), ("high", 0.75)):
            rows.append(result(metric, value=value, reference=None) | {"name": name, "run": run_name, "report": None})
    rows = sorted(rows, key=order)
    assert [(r["name"], r["run"]) for r in rows][::2] == [
        ("kid", "low"), ("bits_per_dim", "low"), ("precision", "high"), ("recall", "high"),
    ]  # fmt: skip
    page = Page(write_table(rows, tmp_path / "results.html", "Scores").read_text())
    for title in ("KID ↓", "precision ↑", "recall ↑", "bits/dim ↓"):
        assert page.text.count(title) == 2


def test_scores_with_every_new_field_make_a_page(tmp_path):
    more = {"split": "train", "rounding": "nearest", "batch_size": 256, "real_value": 2.1, "real_std": None}
    more |= {"per_class": [], "neighbours": "neighbours_1.png", "digest": "0" * 64, "kid_std": 0.1}
    rows = [result(**more), result("KID", **more), result("bits/dim", L_T=1e-5, L_0=1.9, rate=1.8, distortion=1.9)]
    page = read(write_report(run(tmp_path / "a", results=[row | {"name": row["name"]} for row in rows])))
    assert "3.31 ± 0.1" in page.text and RunFolder(tmp_path / "a").report_path.is_file()
