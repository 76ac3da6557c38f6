"""Files of results: what several processes add is all there, each on a line of its own, and every number is finite."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

from diffusion.files import locked, read_csv
from diffusion.runs.results import Results, lock_beside
from diffusion.scoring.sweep import add_points, read_sweep

ADD = """
import sys
from pathlib import Path
from diffusion.runs.results import Results
for k in range(20):
    Results.of_file(Path("a.jsonl"), "out=a.jsonl").add([{"name": sys.argv[1], "metric": "M", "value": k}])
"""


def test_what_two_processes_add_is_all_there(tmp_path):
    started = [
        subprocess.Popen([sys.executable, "-c", ADD, name], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
        for name in ("a", "b")
    ]
    assert [process.wait() for process in started] == [0, 0]
    found = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert sorted((row["name"], row["value"]) for row in found) == [(n, k) for n in "ab" for k in range(20)]
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_result_is_a_line_of_its_own_after_a_file_that_is_cut_off(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"name": "fid", "metric": "FID", "value": 1}\nhand-written')
    results = Results.of_file(path, "out=a.jsonl")
    results.add([{"name": "is", "metric": "IS", "value": 2}])
    assert path.read_text().splitlines()[1:] == ["hand-written", '{"name": "is", "metric": "IS", "value": 2}']
    assert [row["value"] for row in results.rows()] == [1, 2]


def test_a_number_that_is_not_finite_is_named_and_nothing_is_added(tmp_path):
    path = tmp_path / "a.jsonl"
    sound = {"name": "is", "metric": "IS", "value": 2.0}
    for wrong, named in (({"value": float("nan")}, "value=nan"), ({"per_class": [float("inf")]}, "a number")):
        with pytest.raises(ValueError, match=f"No result was added to .*: {named} of the result fid is not finite"):
            Results.of_file(path, "out=a.jsonl").add([sound, {"name": "fid", **wrong}])
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_file_is_waited_for(tmp_path):
    path = tmp_path / "a.jsonl"
    with locked(lock_beside(path), "out=a.jsonl"):
        waits = subprocess.Popen([sys.executable, "-c", ADD, "a"], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
        with pytest.raises(subprocess.TimeoutExpired):
            waits.wait(0.5)
        assert not path.exists()
    assert waits.wait() == 0 and len(path.read_text().splitlines()) == 20


def test_points_of_two_sweeps_in_one_file_are_all_there_the_later_last(tmp_path):
    path = tmp_path / "sweep.csv"
    add_points(path, {"a": {"eta": 0, "fid": 1.5, "samples": "a"}, "b": {"eta": 1, "fid": 2, "samples": "b"}})
    add_points(path, {"c": {"eta": 0, "fid": 3, "samples": "c", "more": "x"}})
    add_points(path, {"a": {"eta": 0, "fid": 4, "samples": "a"}})
    assert list(read_sweep(path)) == ["b", "c", "a"] and read_sweep(path)["a"]["fid"] == "4"
    assert read_csv(path)[0][0]["more"] == "" and [p.name for p in tmp_path.iterdir()] == ["sweep.csv"]
