"""A few of the disturbances that chaos_slurm.py takes any number of."""

import pytest
from chaos_slurm import chaos
from slurm_cluster import NoCluster, up


@pytest.mark.slow
def test_jobs_that_are_disturbed_again_and_again_end_with_the_same_bits(tmp_path, digits):
    try:
        with up(tmp_path / "cluster", 2, "--set", "KillWait=15") as cluster:
            jobs = chaos(cluster, tmp_path, digits, layouts=["2x1"], number=2, at_once=2, restarts=3, steps=90, seed=3)
    except NoCluster as error:
        pytest.skip(str(error))
    assert len(jobs) == 2 and all(job.restarts >= 3 for job in jobs)
    made = [one for job in jobs for one in job.made]
    assert any(one.early for one in made) and not all(one.early for one in made)
