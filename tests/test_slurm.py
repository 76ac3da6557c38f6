"""slurm/, launch/slurm.sh and launch/sweep.sh on a real SLURM: two nodes on this machine, made by tests/slurm-testbed.

The packages are installed only with SLURM_TESTBED_INSTALL=1; without them, or without root, the tests are skipped.
"""

import csv
import json
import re
import shlex
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, inside
from slurm_cluster import Cluster, assert_same, newest, running, text, training
from test_wandb import Files

pytestmark = pytest.mark.slow

STEPS = 80
PLAIN = ["callbacks=none", f"trainer.max_steps={STEPS}", "save.every_steps=6", "log_every=2", "data.batch_size=16"]
PLAIN += ["trainer.threads=1"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with running(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


# ---- several nodes ----


@pytest.fixture(scope="module")
def whole(cluster, digits, tmp_path_factory):
    """(folder of a run of 2 nodes x 2 tasks that nothing interrupted, its output)."""
    folder = tmp_path_factory.mktemp("whole")
    words = [*PLAIN, f"data.root={digits}", f"run_dir={folder / 'run'}", "callbacks=default", "sampler.num_steps=3"]
    words += ["callbacks.grid.num_images=10", "callbacks.score.num_images=20", "extractor=digits"]
    output = folder / "output"
    job = cluster.submit(output, "--nodes=2", "--ntasks-per-node=2", "slurm/train.sbatch", *words)
    cluster.finish(job, output)
    assert cluster.info(job, "ExitCode") == "0:0" and cluster.info(job, "Restarts") == "0"
    return folder / "run", text(output)


def test_two_nodes_with_two_tasks_each_train_and_end_with_results(whole):
    folder, output = whole
    assert "on node[1-2]\n+ srun " in output and "diffusion.train trainer=slurm" in output
    assert output.count("Training digits in") == 1
    trainer = yaml.safe_load((folder / "config.yaml").read_text())["trainer"]
    assert (trainer["devices"], trainer["num_nodes"]) == (2, 2)
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert {(r["name"], r["step"]) for r in rows} == {("fid", STEPS), ("is", STEPS)}
    assert (folder / "report.html").is_file() and (folder / "samples" / f"step_{STEPS:08d}.png").is_file()
    with open(folder / "metrics.csv", newline="") as f:
        assert [int(r["step"]) for r in csv.DictReader(f) if r["train/loss"]] == list(range(2, STEPS + 1, 2))


def test_a_signal_in_training_and_one_at_the_start_requeue_a_job_of_four_tasks(cluster, whole, digits, tmp_path):
    run, output = tmp_path / "run", tmp_path / "output"
    words = [*PLAIN, f"data.root={digits}", f"run_dir={run}", "logger=wandb", "logger.mode=offline"]
    job = cluster.submit(output, "--nodes=2", "--ntasks-per-node=2", "slurm/train.sbatch", *words)
    cluster.until(lambda: newest(run) >= 6, job, output)
    assert cluster.signal(job)
    cluster.until(lambda: text(output).count("+ srun") == 2, job, output)
    # In the imports, of all of them: SLURM kills those that a signal has missed, again and again, and a kill that comes
    # late meets the job's next start, which has the same number.
    cluster.until(lambda: training(run) == 4, job, output)
    assert cluster.signal(job)
    cluster.finish(job, output)
    assert cluster.info(job, "Restarts") == "2"
    assert text(output).count(f"Job {job} is requeued") == 2
    assert re.findall(r"continuing from step (\d+)", text(output)) == re.findall(
        r"signal 10 at step (\d+)", text(output)
    )
    assert_same(run, whole[0])
    logged = Files(run)  # rank 0 ends them, while the others have ended with 138 and --kill-on-bad-exit sees it
    assert [[r.exit.exit_code for r in found if r.HasField("exit")] for found in logged.records] == [[138], [0]]
    assert len({r.run.run_id for r in logged.all("run")}) == 1
    assert "Traceback" not in text(output)


def test_a_node_that_dies_costs_the_steps_since_the_last_checkpoint(cluster, whole, digits, tmp_path):
    run, output = tmp_path / "run", tmp_path / "output"
    words = [*PLAIN, f"data.root={digits}", f"run_dir={run}"]
    job = cluster.submit(output, "--nodes=2", "--ntasks-per-node=2", "slurm/train.sbatch", *words)
    cluster.until(lambda: newest(run) >= 12, job, output)
    cluster.kill_node("node1")  # that of the job's shell and of rank 0
    cluster.finish(job, output)
    assert cluster.info(job, "Restarts") == "1"
    assert "continuing from step" in text(output)
    assert_same(run, whole[0])


# ---- one job, warned, pre-empted, cancelled ----


def test_the_warning_before_the_time_limit_saves_and_requeues_and_a_cancelled_job_saves_and_stays_away(
    cluster, digits, tmp_path
):
    run, output = tmp_path / "run", tmp_path / "output"
    words = [*PLAIN, f"data.root={digits}", f"run_dir={run}", "trainer.max_steps=1000000", "save.every_steps=1000000"]
    job = cluster.submit(output, "--time=2", "--signal=USR1@60", "slurm/train.sbatch", *words)  # looked at every 30 s
    cluster.until(lambda: "is requeued" in text(output), job, output)
    (stopped,) = re.findall(r"Stopped by signal 10 at step (\d+)", text(output))
    assert newest(run) == int(stopped)
    cluster.until(lambda: f"continuing from step {stopped}" in text(output), job, output)
    rows = len(text(run / "metrics.csv").splitlines())
    cluster.until(lambda: len(text(run / "metrics.csv").splitlines()) > rows, job, output)
    cluster.run("scancel", job)
    cluster.finish(job, output, state="CANCELLED")
    (stopped,) = re.findall(r"Stopped by signal 15 at step (\d+)", text(output))
    assert newest(run) == int(stopped)
    assert cluster.info(job, "Restarts") == "1" and text(output).count("is requeued") == 1


def test_a_job_that_a_more_urgent_one_puts_out_comes_back(cluster, digits, tmp_path):
    run, output = tmp_path / "run", tmp_path / "output"
    words = [*PLAIN, f"data.root={digits}", f"run_dir={run}"]
    job = cluster.submit(output, "slurm/train.sbatch", *words)
    cluster.until(lambda: newest(run) >= 6, job, output)
    urgent = cluster.submit(tmp_path / "urgent", "--partition=high", "--nodes=2", "--exclusive", "--wrap=sleep 2")
    cluster.until(lambda: cluster.info(job, "JobState") == "PENDING", job, output)
    cluster.finish(urgent, tmp_path / "urgent")
    cluster.finish(job, output)
    assert cluster.info(job, "Restarts") == "1"
    assert len(re.findall("Stopped by signal 10 at step", text(output))) == 1
    assert inside("train", [*words[:-1], "run_dir=whole"], tmp_path) == 0
    assert_same(run, tmp_path / "whole")


def test_a_job_that_is_cancelled_after_its_warning_stays_away(cluster, tmp_path):
    script, output = tmp_path / "script", tmp_path / "output"
    saving = "trap : USR1; trap 'sleep 1; exit 138' TERM; echo begun; while :; do sleep 0.1; done"
    script.write_text(f'#!/bin/bash\n#SBATCH --ntasks-per-node=1\nsource slurm/job.sh\ntasks bash -c "{saving}"\n')
    job = cluster.submit(output, script)
    cluster.until(lambda: "begun\n" in text(output), job, output)
    assert cluster.signal(job)
    time.sleep(0.5)
    cluster.run("scancel", job)
    cluster.finish(job, output, state="CANCELLED")
    time.sleep(1)
    assert cluster.info(job, "JobState") == "CANCELLED" and cluster.info(job, "Restarts") == "0"
    assert "requeued" not in text(output)


def test_a_refused_configuration_fails_and_is_not_tried_again(cluster, tmp_path):
    output = tmp_path / "output"
    job = cluster.submit(output, "slurm/train.sbatch", "data.batch_size=0", f"run_dir={tmp_path / 'run'}")
    cluster.finish(job, output, state="FAILED")
    assert cluster.info(job, "ExitCode") == "2:0" and cluster.info(job, "Restarts") == "0"
    assert "error: data.batch_size=0" in text(output)


def test_ranks_that_are_refused_one_after_another_end_with_status_2(cluster, tmp_path):
    """The end of the first has srun tell the others to end, which are not far enough to be refused yet."""
    script, output = tmp_path / "script", tmp_path / "output"
    late = 'sleep $SLURM_PROCID; exec "$PYTHON" -m diffusion.train trainer=slurm data.batch_size=6 "$0"'
    script.write_text(f"#!/bin/bash\nsource slurm/job.sh\nexport PYTHON\ntasks bash -c {shlex.quote(late)} $1\n")
    job = cluster.submit(output, "--nodes=2", "--ntasks-per-node=2", script, f"run_dir={tmp_path / 'run'}")
    cluster.finish(job, output, state="FAILED")
    assert cluster.info(job, "ExitCode") == "2:0"
    assert text(output).count("error: data.batch_size=6") == 4


# ---- what counts as progress, and what as an interruption ----

RECORD = "fruitless_starts="


def comment(cluster, job):
    """The comment of a job; what the user and slurm/job.sh have put there."""
    return cluster.run("squeue", "-h", "-t", "all", "-j", job, "-o", "%k")


def script_of(tmp_path, work, *lines):
    """A batch script whose tasks do this in bash, which traps a TERM only if it has not been started deaf to it."""
    path = tmp_path / "script"
    path.write_text(
        "\n".join(
            [
                "#!/bin/bash",
                *lines,
                "source slurm/job.sh",
                f"tasks env --default-signal=TERM bash -c {shlex.quote(work)}",
                "",
            ]
        )
    )
    return path


def starts(cluster, tmp_path, plan, *flags):
    """(job, output) of a job, each of whose starts is warned once it is up, as the letters say: g got on before, f did
    not, p is preempted as well, and did not; e ends by itself."""
    output = tmp_path / "output"
    work = (
        f"trap 'exit 138' USR1; N=${{SLURM_RESTART_COUNT:-0}}; PLAN={plan}; echo begun $N; "
        "case ${PLAN:N:1} in g) rm $DIFFUSION_NOT_YET ;; e) exit 0 ;; esac; while :; do sleep 0.1; done"
    )
    job = cluster.submit(
        output, "--requeue", "--open-mode=append", "--signal=USR1@120", *flags, script_of(tmp_path, work)
    )
    for start, letter in enumerate(plan):
        cluster.until(lambda: f"begun {start}\n" in text(output), job, output)  # noqa: B023
        if letter == "p":
            urgent = cluster.submit(
                tmp_path / "urgent", "--partition=high", "--nodes=2", "--exclusive", "--wrap=sleep 2"
            )
            cluster.until(lambda: cluster.info(job, "JobState") == "PENDING", job, output)
            cluster.finish(urgent, tmp_path / "urgent")
        elif letter != "e":
            assert cluster.signal(job)
    return job, output


def test_a_fruitless_start_after_three_that_got_on_is_requeued(cluster, tmp_path):
    note = 'a note "of mine", seed=3'
    job, output = starts(cluster, tmp_path, "gggfe", "--ntasks-per-node=1", f"--comment={note}")
    cluster.finish(job, output)
    assert (cluster.info(job, "ExitCode"), cluster.info(job, "Restarts")) == ("0:0", "4")
    assert text(output).count(f"Job {job} is requeued and continues from its last checkpoint.") == 4
    assert comment(cluster, job) == note


def test_a_job_is_given_up_after_four_fruitless_starts_in_a_row(cluster, tmp_path):
    """A preempted one is not counted, and ends the row."""
    job, output = starts(cluster, tmp_path, "fffpffff", "--ntasks-per-node=1", "--comment=mine")
    cluster.finish(job, output, state="FAILED")
    assert (cluster.info(job, "ExitCode"), cluster.info(job, "Restarts")) == ("138:0", "7")
    assert text(output).count("is requeued and continues") == 7
    assert f"Job {job} made no progress in 4 starts in a row: it is not requeued." in text(output)
    assert comment(cluster, job) == "mine"


def test_the_count_of_fruitless_starts_waits_in_the_comment(cluster, tmp_path):
    job, output = starts(cluster, tmp_path, "ff", "--ntasks-per-node=1", "--comment=mine")
    cluster.until(lambda: text(output).count("is requeued") == 2, job, output)
    cluster.until(lambda: comment(cluster, job).endswith("2"), job, output)
    assert comment(cluster, job) == f"mine {RECORD}2"
    cluster.run("scancel", job)


@pytest.mark.parametrize(
    "end, status", [("exit 1", {"1:0", "143:0"}), ("exit 2", {"2:0", "143:0"}), ("kill -SEGV $$", {"139:0"})]
)
def test_a_job_one_of_whose_tasks_fails_is_not_requeued(end, status, cluster, tmp_path):
    """Though SLURM then ends the others, whose status is the highest."""
    work = f"trap 'exit 143' TERM; [ $SLURM_PROCID != 3 ] || {{ sleep 0.5; {end}; }}; while :; do sleep 0.1; done"
    output = tmp_path / "output"
    job = cluster.submit(output, "--nodes=2", "--ntasks-per-node=2", script_of(tmp_path, work))
    cluster.finish(job, output, state="FAILED")
    assert cluster.info(job, "ExitCode") in status and cluster.info(job, "Restarts") == "0"
    assert "requeued" not in text(output)


ONCE = "N=${SLURM_RESTART_COUNT:-0}; echo begun $N; [ $N = 0 ] || exit 0; rm -f $DIFFUSION_NOT_YET; "


@pytest.mark.parametrize("name", ["TERM", "KILL"])
def test_a_kill_that_comes_while_the_job_runs_requeues_it(name, cluster, tmp_path):
    """As one does that SLURM repeats, of the start before."""
    work = ONCE + "trap 'exit 143' TERM; while :; do sleep 0.1; done"
    output = tmp_path / "output"
    job = cluster.submit(output, "--open-mode=append", "--nodes=2", "--ntasks-per-node=2", script_of(tmp_path, work))
    cluster.until(lambda: text(output).count("begun 0\n") == 4, job, output)
    assert cluster.signal(job, name)
    cluster.finish(job, output)
    assert cluster.info(job, "Restarts") == "1"
    assert text(output).count("is requeued and continues") == 1


def test_a_job_that_its_time_limit_ends_without_a_warning_is_requeued(cluster, tmp_path):
    """As where the warning came before there were tasks."""
    work = ONCE + "trap 'exit 143' TERM; while :; do sleep 0.1; done"
    output = tmp_path / "output"
    flags = ["--time=1", "--open-mode=append", "--nodes=2", "--ntasks-per-node=1"]
    job = cluster.submit(output, *flags, script_of(tmp_path, work))
    cluster.finish(job, output)
    assert cluster.info(job, "Restarts") == "1"
    assert "DUE TO TIME LIMIT" in text(output) and text(output).count("is requeued and continues") == 1


def test_a_job_whose_tasks_cannot_be_started_is_requeued(cluster, tmp_path):
    output, ready = tmp_path / "output", tmp_path / "ready"
    wait = f'if [ -z "$SLURM_RESTART_COUNT" ]; then touch {ready}; sleep 1.5; fi'
    path = script_of(tmp_path, ONCE + "sleep 100", wait)
    job = cluster.submit(output, "--open-mode=append", "--nodes=2", "--ntasks-per-node=1", path)
    cluster.until(ready.exists, job, output)
    with cluster.paused("node2"):
        time.sleep(10)  # longer than the permission to start something there lasts
    cluster.until(lambda: "is requeued" in text(output), job, output)
    assert "launch failed" in text(output)
    cluster.finish(job, output)
    assert cluster.info(job, "Restarts") == "1"


def test_tasks_that_a_signal_has_missed_as_they_were_not_there_yet_do_not_keep_the_job(cluster, tmp_path):
    output, ready = tmp_path / "output", tmp_path / "ready"
    wait = f'if [ -z "$SLURM_RESTART_COUNT" ]; then touch {ready}; sleep 1; fi'
    work = "trap 'exit 138' USR1; " + ONCE + "while :; do sleep 0.1; done"
    path = script_of(tmp_path, work, wait)
    job = cluster.submit(output, "--open-mode=append", "--nodes=2", "--ntasks-per-node=1", path)
    cluster.until(ready.exists, job, output)
    with cluster.paused("node2"):
        cluster.until(lambda: "begun 0" in text(output), job, output)  # on node1
        step = cluster.info(job, "JobId") + ".0"
        signalling = subprocess.Popen(["scancel", "--signal=USR1", step], env=cluster.env, stderr=subprocess.DEVNULL)
        cluster.until(lambda: "Exited with exit code 138" in text(output), job, output)
    signalling.wait()
    cluster.finish(job, output)
    assert cluster.info(job, "Restarts") == "1" and text(output).count("begun 0") == 2
    assert text(output).count("is requeued and continues") == 1


def test_a_signal_before_and_in_the_imports_requeues_the_job_quietly(cluster, digits, tmp_path):
    run, output = tmp_path / "run", tmp_path / "output"
    words = [*PLAIN, "trainer.max_steps=4", f"data.root={digits}", f"run_dir={run}"]
    job = cluster.submit(output, "slurm/train.sbatch", *words)
    for start, (name, pause) in enumerate([("USR1", 0.0), ("TERM", 0.7), ("USR1", 2.0)], 1):
        cluster.until(lambda: text(output).count("+ srun") == start, job, output)  # noqa: B023
        time.sleep(pause)
        while not cluster.signal(job, name):
            time.sleep(0.02)
        cluster.until(lambda: text(output).count("is requeued") == start, job, output)  # noqa: B023
    cluster.finish(job, output)
    assert cluster.info(job, "Restarts") == "3" and newest(run) == 4
    ours = (
        "Job ",
        "+ srun ",
        "Training ",
        "  data ",
        "  model ",
        "  steps ",
        "Stopped by signal ",
        "Report: ",
        "step ",
    )
    slurms = ("srun: ", "slurmstepd")
    assert [line for line in text(output).splitlines() if not line.startswith((*ours, *slurms))] == []


# ---- arrays ----


class Preempted:
    """One task of an array: signalled in its first and third run while it trains, in its second while it starts."""

    def __init__(self, cluster: Cluster, array: str, task: int, output: Path, run: Path) -> None:
        self.cluster, self.job, self.output, self.run = cluster, f"{array}_{task}", output, run
        self.signalled = 0.0  # when

    def step(self) -> str:
        """Signal it if that is due; its state. On a busy machine a signal can be lost while a step starts, and scancel
        may say of one that arrives that it did not: it is repeated, which does no harm, until the run has ended."""
        state, runs = self.cluster.info(self.job, "JobState"), text(self.output).count("+ srun")
        due = runs <= 3 and (runs == 2 or newest(self.run) >= 6 * runs) and time.monotonic() - self.signalled > 3
        if state == "RUNNING" and due and self.cluster.signal(self.job):
            self.signalled = time.monotonic()
        return state


def test_an_array_of_four_each_preempted_three_times_ends_as_if_nothing_had_been(cluster, digits, tmp_path):
    lines = tmp_path / "lines"
    lines.write_text("# four runs\n" + "".join(f"seed={k} run_dir={tmp_path}/run{k}\n\n" for k in range(4)))
    common = [*PLAIN, "trainer.max_steps=240", f"data.root={digits}"]
    logged = [*common, "logger=wandb", "logger.mode=offline"]
    array = cluster.submit(tmp_path / "output%a", "--array=0-3%2", "slurm/array.sbatch", lines, *logged)
    tasks = [Preempted(cluster, array, k, tmp_path / f"output{k}", tmp_path / f"run{k}") for k in range(4)]
    most, end = 0, time.monotonic() + 500
    while (states := [t.step() for t in tasks]) != ["COMPLETED"] * 4:
        assert time.monotonic() < end and "FAILED" not in states, [states, *(text(t.output) for t in tasks)]
        running = cluster.run("squeue", "-h", "-r", "-j", array, "-t", "RUNNING", "-o", "%i")  # of one moment
        most = max(most, len(running.split()))
        time.sleep(0.2)
    assert 1 <= most <= 2  # %2
    for k, task in enumerate(tasks):
        assert cluster.info(task.job, "Restarts") == "3"
        assert text(task.output).count(f"Job {task.job} is requeued") == 3
        assert inside("train", [*common, f"seed={k}", f"run_dir=whole{k}"], tmp_path) == 0
        assert_same(task.run, tmp_path / f"whole{k}")
    runs = [[r.run for r in Files(task.run).all("run")] for task in tasks]
    assert [len({r.run_id for r in found}) for found in runs] == [1] * 4
    assert len({found[0].run_id for found in runs}) == 4
    assert {r.run_group for found in runs for r in found} == {f"array-{array}"}


def configurations(cluster, tmp_path, array, *words):
    """What each task of the array would train: the output of Hydra's --cfg."""
    job = cluster.submit(tmp_path / "config%A_%a", f"--array={array}", *words, "--cfg", "job", "--resolve")
    outputs = [tmp_path / f"config{job}_{k}" for k in range(int(array.split("-")[1]) + 1)]
    for k, output in enumerate(outputs):
        cluster.finish(f"{job}_{k}", output)
    return [yaml.safe_load(text(o).partition("+ srun")[2].partition("\n")[2]) for o in outputs]


def test_a_line_of_a_file_is_a_run_with_its_own_folder(cluster, tmp_path):
    lines = tmp_path / "lines"
    lines.write_text(
        "# a comment\n"
        "seed=3 optimizer.lr=1e-3\n"
        "\n"
        "+experiment=cifar10 name='ci far' run_dir=elsewhere\n"
        "+experiment=cifar10\n"
    )
    words = ["slurm/array.sbatch", lines, "trainer.max_steps=7"]
    first, second, third = configurations(cluster, tmp_path, "0-2", *words)
    assert (first["seed"], first["optimizer"]["lr"], first["name"]) == (3, 1e-3, "digits")
    assert first["run_dir"] == "runs/digits/optimizer.lr=1e-3,seed=3"
    assert (second["name"], second["run_dir"]) == ("ci far", "elsewhere")
    assert (third["name"], third["run_dir"]) == ("cifar10", "runs/cifar10/default")
    assert {c["trainer"]["max_steps"] for c in (first, second, third)} == {7}
    first, second = configurations(cluster, tmp_path, "0-1", *words, "run_dir=/scratch/a b")
    assert (first["run_dir"], second["run_dir"]) == ("/scratch/a b/optimizer.lr=1e-3,seed=3", "elsewhere")


def test_experiments_times_seeds(cluster, tmp_path):
    words = ["slurm/array.sbatch", "experiment=cifar10,celeba_64", "seed=0,5", "optimizer.lr=1e-3"]
    found = configurations(cluster, tmp_path, "0-3", *words)
    assert [(c["name"], c["seed"], c["run_dir"]) for c in found] == [
        (name, seed, f"runs/{name}/seed={seed}") for name in ("cifar10", "celeba_64") for seed in (0, 5)
    ]
    assert {c["optimizer"]["lr"] for c in found} == {1e-3}


@pytest.mark.parametrize(
    "flags, words, message",
    [
        (["--array=2"], ["array.sbatch", "seed=0,1"], "task 2 of 2 run(s): give --array=0-1."),
        ([], ["array.sbatch", "seed=0,1"], "no array: submit it with sbatch --array=0-N"),
        (["--array=0"], ["array.sbatch", "lines"], "lines is no file"),
        (["--array=1"], ["evaluate.sbatch", "runs/a"], "task 1 of 1 checkpoint(s): give --array=0-0."),
        ([], ["evaluate.sbatch", "--", "num_images=10"], "give one or more checkpoints"),
        (["--gpus-per-node=2"], ["train.sbatch"], "2 GPU(s) but 1 task(s) a node: give --ntasks-per-node=2"),
        (["--nodes=2", "--ntasks=3", "--ntasks-per-node=2"], ["train.sbatch"], "3 tasks on 2 node(s)"),
        (["--chdir=/"], ["train.sbatch"], "/ is not the top folder of a checkout: submit from there"),
        (["--export=ALL,DIFFUSION_VENV=/nowhere"], ["train.sbatch"], "there is no /nowhere/bin/python"),
    ],
)
def test_what_cannot_be_is_said_and_ends_with_status_2(flags, words, message, cluster, tmp_path):
    output = tmp_path / "output"
    job = cluster.submit(output, *flags, f"slurm/{words[0]}", *words[1:])
    cluster.finish(job, output, state="FAILED")
    assert cluster.info(job, "ExitCode") == "2:0"
    assert f"error: {message}" in text(output)


def test_a_task_sees_all_gpus_of_its_node(cluster, tmp_path):
    """Also where SLURM would show it a single one, which is not the one of its local rank."""
    script, output = tmp_path / "script", tmp_path / "output"
    script.write_text("#!/bin/bash\nsource slurm/job.sh\ntasks sh -c 'echo $SLURM_PROCID: $CUDA_VISIBLE_DEVICES'\n")
    job = cluster.submit(output, "--nodes=2", "--ntasks-per-node=2", "--gpus-per-task=1", script)
    cluster.finish(job, output)
    assert sorted(text(output).splitlines()[2:]) == ["0: 0,1", "1: 0,1", "2: 0,1", "3: 0,1"]


# ---- sweeps, by submitit ----


@pytest.fixture
def sweep(cluster, digits, tmp_path):
    """`sweep(*words)`: submit it by launch/sweep.sh; what that says, and (job, folder, output) of each run."""

    def submit(*words: str):
        said = cluster.run("bash", "launch/sweep.sh", "launcher=slurm", *words, f"data.root={digits}")
        runs = re.findall(r"^job (\S+) trains (.+) and prints to (.+)$", said, re.M)
        return said, [(job, Path(folder), Path(output)) for job, folder, output in runs]

    return submit


def test_a_sweep_is_an_array_of_runs_and_one_that_is_warned_goes_on_in_its_folder(cluster, sweep, digits, tmp_path):
    common = [*PLAIN, "callbacks=default", "sampler.num_steps=3", "extractor=digits"]
    common += ["callbacks.grid.num_images=10", "callbacks.score.num_images=20"]
    words = [*common, "--time=30", "seed=0,1,2", f"run_dir={tmp_path}/runs", "logger=wandb", "logger.mode=offline"]
    said, runs = sweep(*words)
    first, *commands, submitted = [line for line in said.splitlines() if line.startswith("+ ")]
    assert "-m diffusion.train --multirun launcher=slurm " in first and submitted.startswith("+ sbatch ")
    assert [c.startswith("+ python -m diffusion.train trainer=slurm ") for c in commands] == [True] * 3
    array = runs[0][0].partition("_")[0]
    assert [job for job, *_ in runs] == [f"{array}_{k}" for k in range(3)]
    job, folder, output = runs[1]
    cluster.until(lambda: newest(folder) >= 6, job, output)
    assert cluster.signal(job)
    for k, (job, folder, output) in enumerate(runs):
        cluster.finish(job, output)
        assert (cluster.info(job, "Restarts"), cluster.info(job, "TimeLimit")) == (str(int(k == 1)), "00:30:00")
        assert commands[k] in text(output) and yaml.safe_load((folder / "config.yaml").read_text())["seed"] == k
        rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
        assert {(r["name"], r["step"]) for r in rows} == {("fid", STEPS), ("is", STEPS)}
        assert (folder / "report.html").is_file()
    stops = re.findall(r"signal 10 at step (\d+)", text(runs[1][2]))
    assert len(stops) == 1 and re.findall(r"continuing from step (\d+)", text(runs[1][2])) == stops
    assert inside("train", [*common, f"data.root={digits}", "seed=1", "run_dir=whole"], tmp_path) == 0
    assert_same(runs[1][1], tmp_path / "whole")
    assert {r.run.run_group for _, folder, _ in runs for r in Files(folder).all("run")} == {f"array-{array}"}
    again = sweep(*words)[1]
    assert [folder for _, folder, _ in again] == [folder for _, folder, _ in runs]
    for job, folder, output in again:
        cluster.finish(job, output)
        assert f"Already complete ({STEPS} steps)" in text(output) and f"{folder}/report.html" in text(output)


def test_a_sweep_of_one_run_on_two_nodes_that_is_preempted_comes_back(cluster, sweep, whole, tmp_path):
    words = [*PLAIN, "--nodes=2", "launcher.tasks_per_node=2", f"run_dir={tmp_path}/runs"]
    ((job, folder, output),) = sweep(*words)[1]
    cluster.until(lambda: newest(folder) >= 6, job, output)
    urgent = cluster.submit(tmp_path / "urgent", "--partition=high", "--nodes=2", "--exclusive", "--wrap=sleep 2")
    cluster.until(lambda: cluster.info(job, "JobState") == "PENDING", job, output)
    cluster.finish(urgent, tmp_path / "urgent")
    cluster.finish(job, output)
    assert cluster.info(job, "Restarts") == "1"
    assert len(re.findall("Stopped by signal 10 at step", text(output))) == 1
    assert_same(folder, whole[0])


def test_the_flags_of_a_sweep_are_worth_more_than_the_variables_of_sbatch_and_these_than_nothing(
    cluster, sweep, monkeypatch, tmp_path
):
    monkeypatch.setitem(cluster.env, "SBATCH_PARTITION", "high")
    monkeypatch.setitem(cluster.env, "SBATCH_TIMELIMIT", "7")
    for flags, found in (
        ([], ("high", "00:07:00")),
        (["--partition=debug", "hydra.launcher.timeout_min=9"], ("debug", "00:09:00")),
    ):
        ((job, *_),) = sweep(*flags, "--begin=now+1hour", f"run_dir={tmp_path}/runs")[1]
        assert (cluster.info(job, "Partition"), cluster.info(job, "TimeLimit")) == found
        cluster.run("scancel", job)


@pytest.mark.parametrize(
    "words, message",
    [
        (["optimizer.lr=1e-3,-1"], "error: optimizer.lr=-1 must be above 0."),
        (["seed=0,1", "--partition=none"], "error: sbatch has rejected the sweep, for the reason above"),
        (["seed=0,1", "launcher.max_num_timeout=3"], "error: launcher.max_num_timeout has no effect here"),
    ],
)
def test_a_sweep_that_cannot_be_submitted_is_refused_as_a_whole(words, message, cluster, tmp_path):
    words = ["bash", "launch/sweep.sh", "launcher=slurm", f"run_dir={tmp_path}/runs", *words]
    done = subprocess.run(words, cwd=ROOT, env=cluster.env, text=True, capture_output=True)
    assert done.returncode == 2 and message in done.stderr and "job " not in done.stdout
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.name != "multirun.yaml"]


# ---- training and scoring ----


def test_scores_are_made_when_training_has_ended(cluster, digits, tmp_path):
    run = tmp_path / "run"
    words = [f"--output={tmp_path}/train", *PLAIN, "trainer.max_steps=4", f"data.root={digits}", f"run_dir={run}"]
    words += ["--", f"--output={tmp_path}/evaluate", "num_images=20", "sampler.num_steps=3", "metrics=[fid]"]
    said = cluster.run("bash", "launch/slurm.sh", *words)
    train, evaluate = re.findall(r"^job (\d+)$", said, re.M)
    assert f"--dependency=afterok:{train}" in said
    cluster.finish(evaluate, tmp_path / "evaluate")
    assert cluster.info(train, "JobState") == "COMPLETED"
    (row,) = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    assert (row["step"], row["num_images"], row["num_steps"]) == (4, 20, 3)


def test_there_are_no_scores_of_a_training_that_failed(cluster, tmp_path):
    words = ["+experiment=cifar10", f"data.root={tmp_path / 'missing'}", f"run_dir={tmp_path / 'run'}"]
    words = [f"--output={tmp_path}/train", *words]
    said = cluster.run("bash", "launch/slurm.sh", *words, "--", f"--output={tmp_path}/evaluate")
    train, evaluate = re.findall(r"^job (\d+)$", said, re.M)
    cluster.finish(evaluate, tmp_path / "evaluate", state="CANCELLED")
    assert cluster.info(train, "JobState") == "FAILED"


def test_a_misspelt_key_is_refused_before_anything_is_submitted(cluster, tmp_path):
    for words in (["sampler.num_stepss=3"], ["--", "sampler.num_stepss=3"]):
        done = subprocess.run(
            ["bash", "launch/slurm.sh", *words], cwd=ROOT, env=cluster.env, text=True, capture_output=True
        )
        assert done.returncode == 2 and "Did you mean sampler.num_steps?" in done.stderr
        assert "job" not in done.stdout


def test_checkpoints_are_scored_by_the_tasks_of_an_array_two_processes_each(cluster, digits, tmp_path):
    words = [*PLAIN, "trainer.max_steps=4", "save.every_steps=2", f"data.root={digits}", "run_dir=run"]
    assert inside("train", words, tmp_path) == 0
    checkpoints = sorted(tmp_path.glob("run/checkpoints/step_*.ckpt"))
    overrides = ["num_images=20", "sampler.num_steps=3", "metrics=[fid]"]
    flags = ["--array=0-1", "--ntasks-per-node=2"]
    job = cluster.submit(tmp_path / "output%a", *flags, "slurm/evaluate.sbatch", *checkpoints, "--", *overrides)
    for k in range(2):
        cluster.finish(f"{job}_{k}", tmp_path / f"output{k}")
    rows = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    assert sorted(r["step"] for r in rows) == [2, 4]


def test_checkpoints_of_one_job_that_are_scored_are_not_scored_again_after_a_requeue(cluster, tmp_path):
    """By a stand-in for Python that shows what it is called with: what is tested is the batch script."""
    output, python = tmp_path / "output", tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        """#!/bin/bash
trap 'exit 138' USR1
echo "${SLURM_RESTART_COUNT:-0}: $3"
[ "$3" != checkpoint=fails ] || exit 1
while [ "$3 $SLURM_RESTART_COUNT" = "checkpoint=b " ]; do sleep 0.1; done
"""
    )
    python.chmod(0o755)
    words = ["--comment=mine", f"--export=ALL,DIFFUSION_VENV={tmp_path / 'venv'}", "slurm/evaluate.sbatch"]
    job = cluster.submit(output, *words, "a", "fails", "b", "c")
    cluster.until(lambda: "0: checkpoint=b\n" in text(output), job, output)
    cluster.run("scancel", "--signal=USR1", job)
    cluster.finish(job, output, state="FAILED")
    scored = re.findall(r"^(\d): checkpoint=(\w+)$", text(output), re.M)
    assert scored == [("0", "a"), ("0", "fails"), ("0", "b"), ("1", "fails"), ("1", "b"), ("1", "c")]
    assert cluster.info(job, "ExitCode") == "1:0" and comment(cluster, job) == "mine scored=0,2,3"
