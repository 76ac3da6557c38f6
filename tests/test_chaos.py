"""A few of the kills that chaos.py takes any number of."""

import pytest
from chaos import SIGNALS, chaos, differences

from diffusion.training.fingerprint_log import log_path


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(tmp_path, digits):
    made = chaos(tmp_path, number=5, steps=120, words=[f"data.root={digits}"])
    assert len(made) == 5 and {kill.number for kill in made} == set(SIGNALS)
    assert {"start", "write"} <= {kill.phase for kill in made}

    def edit(path, old, new):
        lines = path.read_text().splitlines()
        lines[7] = lines[7].replace(old, new, 1)
        path.write_text("\n".join(lines) + "\n")

    for path in (tmp_path / "killed" / "metrics.csv", log_path(tmp_path / "killed", 0)):  # or it would see nothing
        edit(path, "7,", "8,")
    assert len(differences(tmp_path / "killed", tmp_path / "whole", 120)) >= 2
