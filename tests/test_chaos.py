"""A few of the kills that chaos.py takes any number of."""

import signal

import pytest
from chaos import STEPS, chaos, differences

from diffusion.build.extractors import prepare_digits
from diffusion.training.fingerprint_log import log_path


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes(tmp_path):
    prepare_digits(tmp_path / "digits", "digits_held_out")
    made = chaos(tmp_path, number=10, words=[f"data.root={tmp_path}/digits"])
    assert len(made) == 10 and {signal.SIGKILL, signal.SIGTERM} <= {kill.number for kill in made}
    assert {"start", "write"} <= {kill.phase for kill in made}
    assert "Traceback" not in (tmp_path / "output.txt").read_text()

    last, whole = max(tmp_path.glob("killed_*")), tmp_path / "whole"
    assert not differences(last, whole, STEPS)

    def edit(path, old, new):
        lines = path.read_text().splitlines()
        lines[3] = lines[3].replace(old, new, 1)
        path.write_text("\n".join(lines) + "\n")

    edit(last / "metrics.csv", "6,", "7,")
    edit(log_path(last, 0), "3,", "4,")
    edit(last / "results.jsonl", "fid", "fit")
    picture = next((last / "samples").glob("step_*.png"))
    picture.write_bytes(picture.read_bytes() + b"\0")
    assert len(differences(last, whole, STEPS)) >= 4  # or it would see nothing
