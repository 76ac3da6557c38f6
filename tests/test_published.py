"""The papers' figures as data: stated once, true to each other, and a result put beside the one it repeats."""

import pytest
import yaml
from conftest import ROOT

from diffusion.metrics.published import (
    INCEPTION_SHA256,
    TABLES,
    aligned,
    common,
    counterpart,
    deviations,
    filled,
    not_recorded,
    places,
    table_text,
    unplaced,
)
from diffusion.metrics.published.papers import (
    DDIM_BEDROOM,
    DDIM_CELEBA,
    DDIM_CHURCH,
    DDIM_CIFAR10,
    DDPM_CIFAR10,
    DDPM_LSUN,
    DDPM_OBJECTIVES,
    DDPM_RATE,
    DDPM_RATE_DISTORTION,
    FLOW_CIFAR10,
    NCSN_CIFAR10,
    SIGMA_HAT,
)

# A FID as the paper took its own: nothing in it is otherwise.
FID = {
    "metric": "FID", "name": "fid", "value": 3.31, "data": "cifar10", "num_images": 50_000, "num_reference": 50_000,
    "split": "train", "weights": "ema", "extractor": "inception", "extractor_sha256": INCEPTION_SHA256,
    "sampler": "ancestral", "variance": "large", "num_steps": 1000, "spacing": "linear", "clip_x0": True,
    "guidance_scale": 1.0, "rounding": "nearest", "reference_format": "png", "image_size": 32, "num_classes": 0,
    "parameters": 35_746_307, "prediction": "epsilon", "objective": "simple", "step": 800_000,
}  # fmt: skip
IS = FID | {"metric": "IS", "name": "is", "value": 9.40, "is_std": 0.1}
BITS = {
    "metric": "bits/dim", "name": "bits_per_dim", "value": 3.77, "rate": 1.80, "distortion": 1.97, "split": "test",
    "num_images": 10_000, "data": "cifar10", "weights": "ema", "prediction": "epsilon", "objective": "simple",
}  # fmt: skip
DDIM = FID | {"sampler": "ddim", "eta": 0.0, "num_steps": 50, "spacing": "quadratic", "clip_x0": False}
DDIM.pop("variance")


def tables(row):
    return list(dict.fromkeys(place.table.title for place in places(row)))


# ---- the data ----


def test_each_published_figure_is_stated_once():
    stated = {}
    for table in TABLES:
        for line in table.lines:
            assert len(line.figures) == len(table.columns), (table.title, line.title)
            for column, figure in zip(table.columns, line.figures, strict=True):
                if figure is not None and figure.value is not None:
                    meaning = (column.metric, column.value, column.data, column.split, column.likelihood, figure.text)
                    stated.setdefault(meaning, {}).setdefault(id(figure), []).append(f"{table.source}: {line.title}")
    assert [places for places in stated.values() if len(places) > 1] == []
    assert len(stated) > 150


def test_every_table_says_where_it_stands_and_every_line_is_told_apart():
    assert len({(t.source, t.title) for t in TABLES}) == len(TABLES)
    for table in TABLES:
        assert "arXiv:" in table.paper and table.place.startswith(("Table ", "sec. "))
        conditions = [tuple(line.of.items()) for line in table.lines if line.of]
        assert len(set(conditions)) == len(conditions)


def test_the_figures_agree_with_each_other():
    simple = DDPM_CIFAR10.lines[-1].figures
    rate, distortion = (f.value for f in DDPM_RATE.lines[0].figures)
    assert rate + distortion == pytest.approx(simple[3].value)  # the code length is their sum
    times = [[f.value for f in line.figures] for line in DDPM_RATE_DISTORTION.lines]
    assert round(times[0][0], 2) == rate
    assert all(a[0] > b[0] and a[1] < b[1] for a, b in zip(times, times[1:], strict=False))  # a bit more, a bit nearer
    assert all(test.value > train.value for *_, test, train in (n.figures for n in DDPM_CIFAR10.lines) if train)
    for table in (DDIM_CIFAR10, DDIM_CELEBA, DDIM_BEDROOM, DDIM_CHURCH):
        lines = [[f.value for f in line.figures if f is not None] for line in table.lines]
        assert all(a > b for line in lines for a, b in zip(line, line[1:], strict=False))  # more steps are better
    for table in (DDIM_CIFAR10, DDIM_CELEBA):  # and so is less noise, up to 100 steps
        assert all(a.value < b.value for i in range(4) for a, b in zip(*columns_of(table, i), strict=True))


def columns_of(table, column):
    """Neighbours in a column from the smallest eta to sigma hat."""
    found = [line.figures[column] for line in table.lines]
    return found[:-1], found[1:]


def test_the_extractor_is_the_one_that_conf_asks_for():
    conf = yaml.safe_load((ROOT / "conf" / "extractor" / "inception.yaml").read_text())
    assert conf["sha256"] == INCEPTION_SHA256


def test_experiments_carry_the_figures_of_the_tables():
    """`paper:` of an experiment, and the figure beside which its own scores are put."""
    for path in (ROOT / "conf" / "experiment").glob("*.yaml"):
        conf = yaml.safe_load(path.read_text())
        paper, data = conf.get("paper") or {}, path.stem.removesuffix("_large")
        if data not in {c.data for t in TABLES for c in t.columns}:
            continue
        sampler = "large" if any("ancestral_large" in str(d) for d in conf["defaults"]) else "small"
        row = {"name": "fid", "value": 1.0, "data": data, "sampler": "ancestral", "variance": sampler}
        row |= {"num_steps": 1000, "parameters": 256_000_000 if path.stem.endswith("_large") else 114_000_000}
        for metric in ("fid", "is"):
            if paper.get(metric) is not None:
                assert counterpart(row | {"name": metric}).value == paper[metric], path.stem


# ---- where a result belongs ----


@pytest.mark.parametrize(
    "row, table, published",
    [
        (FID, DDPM_CIFAR10, "3.17"),
        (IS, DDPM_CIFAR10, "9.46±0.11"),
        (FID | {"split": "test"}, DDPM_CIFAR10, "5.24"),
        (FID | {"objective": "bound"}, DDPM_CIFAR10, "13.51"),
        (BITS, DDPM_CIFAR10, "≤3.75"),
        (BITS | {"split": "train"}, DDPM_CIFAR10, "3.72"),
        (BITS | {"objective": "bound"}, DDPM_CIFAR10, "≤3.70"),
        (BITS | {"likelihood": "ode"}, FLOW_CIFAR10, "3.28"),
        (FID, DDPM_OBJECTIVES, "3.17"),
        (FID | {"prediction": "mu", "objective": "bound"}, DDPM_OBJECTIVES, "13.22"),
        (FID | {"prediction": "mu", "objective": "bound", "variance": "learned"}, DDPM_OBJECTIVES, "23.69"),
        (FID | {"prediction": "mu", "objective": "bound", "learned_variance": True}, DDPM_OBJECTIVES, "23.69"),
        (FID | {"prediction": "mu"}, DDPM_OBJECTIVES, "unstable"),
        (BITS | {"likelihood": "ode", "schedule": "sub_vp"}, FLOW_CIFAR10, "3.05"),
        (BITS | {"likelihood": "ode", "schedule": "vp_continuous"}, FLOW_CIFAR10, "3.21"),
        (FID | {"data": "lsun_cat", "variance": "small"}, DDPM_LSUN, "19.75"),
        (FID | {"data": "lsun_bedroom", "parameters": 256_000_000}, DDPM_LSUN, "4.90"),
        (FID | {"data": "data/lsun_church/"}, DDPM_LSUN, "7.89"),
        (FID, DDIM_CIFAR10, "3.17"),
        (FID | {"variance": "small"}, DDIM_CIFAR10, "4.73"),
        (FID | {"num_steps": 100}, DDIM_CIFAR10, "9.99"),
        (DDIM, DDIM_CIFAR10, "4.67"),
        (DDIM | {"eta": 0.5, "num_steps": 20, "data": "celeba_64"}, DDIM_CELEBA, "16.06"),
        (DDIM | {"data": "lsun_bedroom", "eta": 1.0, "num_steps": 10}, DDIM_BEDROOM, "42.78"),
        (FID | {"data": "lsun_church", "variance": "small"}, DDIM_CHURCH, "7.89"),
    ],
)
def test_a_result_stands_beside_the_figure_it_repeats(row, table, published):
    found = [place for place in places(row) if place.table is table and place.column.value == "value"]
    assert [place.figure.text for place in found] == [published]
    expected = None if published == "unstable" else pytest.approx(row["value"] - found[0].figure.value)
    assert found[0].difference == expected


@pytest.mark.parametrize(
    "row",
    [
        FID | {"extractor": "digits"},
        FID | {"data": "digits"},
        FID | {"data": "celebahq"},
        FID | {"name": "kid"},
        BITS | {"data": "lsun_cat"},
        {"name": "fid", "value": 1.0},
        {"name": "fid", "data": "cifar10"},
        {},
    ],
)
def test_a_result_of_another_kind_has_no_place(row):
    assert places(row) == [] and counterpart(row) is None
    assert unplaced([row]) == [table_text([row])]


def test_a_result_goes_where_its_sampler_does():
    assert tables(DDIM) == [DDIM_CIFAR10.title]  # and not beside 3.17, which is of 1,000 ancestral steps
    assert tables(DDIM | {"name": "is"}) == [DDPM_CIFAR10.title]  # no other has it
    assert tables(FID | {"sampler": "annealedlangevin"}) == [NCSN_CIFAR10.title]
    assert tables(FID | {"num_steps": 250}) == [DDIM_CIFAR10.title]
    without = {k: v for k, v in FID.items() if k not in ("sampler", "prediction", "objective")}  # of images at hand
    assert tables(without) == [DDPM_CIFAR10.title]


def test_what_no_line_repeats_has_a_place_and_no_difference():
    for row in (
        DDIM | {"eta": 0.3},
        DDIM | {"num_steps": 37},
        FID | {"objective": "hybrid"},
        FID | {"num_classes": 10},
        FID | {"schedule": "vp_cosine"},
        DDIM | {"schedule": "vp_linear of 4,000 levels"},
        BITS | {"schedule": "ve_geometric"},
    ):
        found = places(row)
        assert found and {place.figure for place in found} == {None} == {place.difference for place in found}


def test_a_fid_to_the_test_split_is_held_against_one_to_the_test_split_where_there_is_one():
    assert {place.figure.text for place in places(FID | {"split": "test"})} == {"5.24"}  # in DDPM's Table 1 alone
    assert [p.figure.text for p in places(FID | {"split": "validation"}) if p.table is DDPM_CIFAR10] == ["3.17"]
    found = places(DDIM | {"data": "celeba_64", "split": "test"})
    assert [(place.table, place.figure.text) for place in found] == [(DDIM_CELEBA, "9.17")]
    assert counterpart(FID | {"split": "test"}).value == 5.24 and counterpart(DDIM | {"split": "test"}) is None


def test_the_line_of_the_bound_is_of_epsilon_without_a_learned_variance():
    """DDPM's Table 1; the other models of the bound are told apart in Table 2."""
    bound = FID | {"objective": "bound"}
    for row in (bound | {"prediction": "mu"}, bound | {"learned_variance": True}, bound | {"prediction": "v"}):
        assert [place.figure for place in places(row) if place.table is DDPM_CIFAR10] == [None]
    assert counterpart(bound | {"prediction": "mu"}).value == 13.22
    assert counterpart(bound).value == 13.51


def test_of_a_bound_the_two_parts_are_compared_as_well():
    found = {place.column.value: place.difference for place in places(BITS) if place.table is DDPM_RATE}
    assert found == {"rate": pytest.approx(0.02), "distortion": pytest.approx(0.0)}
    found = places(BITS | {"rmse_255": 19.0, "rate": 0.05, "reverse_steps": 800})
    assert [p.figure.text for p in found if p.table is DDPM_RATE_DISTORTION] == ["0.05415", "18.47482"]


# ---- the tables with results in them ----


def line_of(filled_table, title):
    return next(i for i, line in enumerate(filled_table.lines) if line.title == title)


def test_all_scores_of_one_evaluation_are_one_line_below_the_published_one():
    found = filled([FID, IS, FID | {"split": "test", "value": 5.0}, BITS])[0]
    assert found.table is DDPM_CIFAR10
    at = line_of(found, "DDPM, L_simple")
    own = found.lines[at + 1]
    assert [line.own for line in found.lines].count(True) == 1 and own.own and own.section == "Unconditional"
    texts = [own.cells.get(column) for column in found.columns]
    assert texts == ["9.40±0.10 (-0.06)", "3.31 (+0.14)", "5.00 (-0.24)", "3.77 (+0.02)", None]


def test_two_evaluations_are_two_lines():
    rows = [FID, FID | {"weights": "raw", "value": 12.1}, FID | {"value": 3.4, "seed": 1}]
    found = filled(rows)[0]
    own = [line for line in found.lines if line.own]
    assert [line.cells[found.columns[1]] for line in own] == ["3.31 (+0.14)", "12.10 (+8.93)", "3.40 (+0.23)"]
    assert "raw weights" in own[1].title and "raw" not in own[0].title + own[2].title


def test_a_grid_grows_by_the_steps_and_etas_of_results():
    found = filled([DDIM, DDIM | {"num_steps": 37, "value": 5.1}, DDIM | {"eta": 0.3, "num_steps": 10, "value": 15.0}])[
        0
    ]
    assert [column.steps for column in found.columns] == [10, 20, 37, 50, 100, 1000]
    order = [line.title.partition(",")[0] if line.own else line.title for line in found.lines]
    assert order == ["η = 0", "this run", "η = 0.2", "this run", "η = 0.5", "η = 1", SIGMA_HAT]
    by_steps = {c.steps: text for c, text in found.lines[1].cells.items()}
    assert by_steps == {50: "3.31 (-1.36)", 37: "5.10"}
    assert {c.steps: text for c, text in found.lines[3].cells.items()} == {10: "15.00"}


def test_what_is_not_like_a_line_stands_below_the_one_of_its_eta():
    found = filled([DDIM | {"eta": 0.5, "guidance_scale": 2.0}, FID | {"num_classes": 10, "num_steps": 100}])[-1]
    assert found.table is DDIM_CIFAR10
    assert [line.own for line in found.lines] == [False, False, False, True, False, False, True]


def test_a_conditional_model_stands_with_the_conditional_ones_and_is_not_held_against_another():
    found = filled([FID | {"num_classes": 10}])[0]
    own = next(line for line in found.lines if line.own)
    assert own.section == "Conditional" and own.differences == {} and own.cells[found.columns[1]] == "3.31"


def test_the_text_for_a_terminal():
    text = table_text([FID | {"num_images": 2000}, IS | {"num_images": 2000}, FID | {"data": "digits", "metric": "x"}])
    lines = text.splitlines()
    assert lines[0] == "CIFAR-10: Ho et al. 2020 (arXiv:2006.11239), Table 1"
    published = next(i for i, line in enumerate(lines) if line.startswith("  DDPM, L_simple"))
    assert lines[published + 1].startswith("> this run, step 800,000, ancestral, 1,000 steps")
    assert lines[published].index("3.17") == lines[published + 1].index("3.31 (+0.14)")  # one column
    assert text.count("2,000 images where the papers score 50,000") == 1
    assert text.endswith("Not comparable with published scores: x, as the papers' tables have nothing on digits.")
    assert table_text([]) == ""
    assert "Not as in the papers" not in table_text([FID]) and "Not recorded" not in table_text([FID])


def test_a_combining_mark_takes_no_room():
    assert [line.index("|") for line in aligned([["a", "|"], [SIGMA_HAT, "|"], ["ab", "|"]])] == [4, 5, 4]


# ---- departures ----


@pytest.mark.parametrize("row", [FID, IS, BITS, DDIM], ids=lambda r: r["name"])
def test_nothing_is_said_of_a_result_that_was_made_as_published(row):
    assert deviations(row) == [] and not_recorded(row) == []


@pytest.mark.parametrize(
    "row, change, words",
    [
        (FID, {"num_images": 49_999}, "49,999 images where the papers score 50,000"),
        (FID, {"num_images": 60_000}, "60,000 images where the papers score 50,000"),
        (FID, {"num_reference": 10_000}, "10,000 real images where the train split of CIFAR-10 has 50,000"),
        (FID, {"split": "test", "num_reference": 10_000}, "FID 3.17 against train and 5.24 against test"),
        (FID, {"weights": "raw"}, "Raw weights where the papers score their moving average"),
        (FID, {"extractor": "digits"}, "Features of the digits extractor"),
        (FID, {"extractor_sha256": "0" * 64}, "Inception weights with sha256 00000000…"),
        (FID, {"rounding": "floor"}, "Pixels rounded by floor"),
        (FID, {"reference_format": "jpg"}, "stored as JPEG"),
        (FID, {"schedule": "vp_cosine"}, "A model of schedule=vp_cosine where those of DDPM and DDIM have vp_linear"),
        (FID, {"learned_variance": True}, "learned how wide a step is, by the large variance in place of its own"),
        (FID, {"image_size": 64}, "64x64 pixels where the table is about 32x32"),
        (FID, {"sampler": "heun"}, "Table 1: sampled by ancestral, this by heun"),
        (FID, {"clip_x0": False}, "Table 1 and Table 2: sampler.clip_x0=true, here false"),
        (IS, {"num_steps": 250}, "Table 1: 1,000 steps, here 250"),
        (IS, {"variance": "small"}, "Table 1 and Table 2: sampler.variance=large on this set, here small"),
        (FID, {"num_classes": 10}, "told the class, where"),
        (FID, {"guidance_scale": 2.0, "num_classes": 10}, "told the class, guided with scale 2, where"),
        (DDIM, {"spacing": "linear"}, "Table 1: sampler.spacing=quadratic on this set, here linear"),
        (DDIM, {"clip_x0": True}, "Table 1: sampler.clip_x0=false, here true"),
        (BITS, {"num_images": 1000}, "bits/dim of 1,000 images where the test split of CIFAR-10 has 10,000"),
        (BITS, {"weights": "raw"}, "Raw weights"),
    ],
)
def test_each_departure_is_said_in_words(row, change, words):
    found = deviations(row | change)
    also = ["(DDIM" in sentence for sentence in found if words not in sentence]  # another table that it is put in
    assert len(found) - len(also) == 1 and all(also), found


@pytest.mark.parametrize("row", [FID, IS, BITS, DDIM], ids=lambda r: r["name"])
def test_a_result_may_say_less(row):
    for name in row:
        less = {k: v for k, v in row.items() if k != name}
        table_text([less])
        assert all(isinstance(s, str) for s in deviations(less) + not_recorded(less))
        assert unplaced([less]) == [] or places(less) == []
    assert not_recorded({k: v for k, v in FID.items() if k not in ("split", "rounding")}) == ["split", "rounding"]
    table_text([{}])


def test_what_is_about_some_rows_alone_names_them():
    rows = [FID | {"split": "test", "num_reference": 10_000}, IS]
    assert [s.startswith("FID: Real images of the test split") for s in common(rows, deviations)] == [True]
    few = [row | {"num_images": 100} for row in (FID, IS)]
    assert [s.startswith("100 images") for s in common(few, deviations)] == [True]
