"""Disturb the jobs of a SLURM cluster again and again, and see that each ends with the bits of an undisturbed one.

    python tests/chaos_slurm.py [--layouts 3x1 2x2] [--jobs 5] [--at-once 2] [--restarts 12] [--seed S] [--folder DIR]

A cluster of its own is started by tests/slurm-testbed. For each layout, nodes x tasks per node, a small training of the
digits is left alone, and an array of the same training, `--array=0-4%2` as a rule, is disturbed: each job at random
moments, from the start of its batch script, through the imports, to its steps and its saves.

    warn     USR1 to its tasks, as before the time limit
    term     TERM to its tasks, as when SLURM repeats an old kill
    kill     KILL to its tasks, the same
    requeue  scontrol requeue
    node     one of its nodes loses its power, and with it every other job there
    drain    one of its nodes is drained and the job requeued

A job that has been restarted so often may end. Weights, average, optimizer, metrics.csv but for its speeds, and the
fingerprints of all steps must be those of the job that was left alone. No output may have a traceback, no job may be
given up. At most two disturbances in a row come before a job has saved something. Exit status 0 if all holds, else 1.
"""

import argparse
import random
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from chaos import EVERY, ROOT, Wrong, differences
from slurm_cluster import LIVING, Cluster, NoCluster, newest, text, up

WORDS = ["callbacks=none", "trainer.threads=1", "data.batch_size=12", f"save.every_steps={EVERY}", "save.keep=2"]
WORDS += ["log_every=1", "fingerprint_every=1"]
KINDS = ("warn", "warn", "term", "kill", "requeue", "node", "drain")
SIGNALS = {"warn": "USR1", "term": "TERM", "kill": "KILL"}
PATIENCE = 400  # seconds in which no job begins, ends or saves anything
NOISE = re.compile(
    r"Traceback|Exception ignored|Fatal Python error|terminate called|made no progress|cannot be changed"
)


class Disturbance(NamedTuple):
    """What was done; whether before the job had saved something in this start; its newest checkpoint then."""

    kind: str
    early: bool
    step: int


class Job:
    """A task of an array: where it is, and what comes next.

    Args:
        name: for SLURM, ARRAY_TASK. run: its run folder. output: what it prints. number: restarts after which it may
            end. draw: decides what comes when. start_up: seconds to the first checkpoint of an undisturbed job.
    """

    def __init__(
        self, name: str, run: Path, output: Path, number: int, draw: random.Random, start_up: float = 0.0
    ) -> None:
        self.name, self.run, self.output, self.number = name, run, output, number
        self.draw, self.start_up = draw, start_up
        self.state, self.restarts, self.nodes = "PENDING", 0, ""
        self.made: list[Disturbance] = []
        self._begin(-1, 0.0)

    def _begin(self, start: int, now: float) -> None:
        """Plan for a start that has just been seen."""
        self.start, self.began, self.from_step, self.done = start, now, newest(self.run), False
        early = 0
        for one in reversed(self.made):
            if not one.early:
                break
            early += 1
        self.early = early < 2 and self.draw.random() < 0.5
        self.kind = self.draw.choice(KINDS)
        self.pause = self.draw.uniform(0, self.start_up) if self.early else self.draw.uniform(0, 1.5)
        self.due: float | None = now + self.pause if self.early else None

    def look(self, fields: dict[str, str], now: float) -> None:
        """Take in what `scontrol show job` says. Raises Wrong if the job has ended and should not."""
        self.state, self.restarts, self.nodes = fields["JobState"], int(fields["Restarts"]), fields["NodeList"]
        if self.state == "COMPLETED":
            if self.restarts < self.number:
                raise Wrong(f"job {self.name} ended after {self.restarts} restarts: give it more --steps")
        elif self.state not in LIVING:
            raise Wrong(
                f"job {self.name} is {self.state} after {self.restarts} restarts, disturbed by {self.made[-1:]}"
            )
        elif self.state == "RUNNING" and self.start != self.restarts:
            self._begin(self.restarts, now)

    def is_due(self, now: float) -> bool:
        """Whether it is to be disturbed now."""
        if self.state != "RUNNING" or self.done or self.restarts >= self.number:
            return False
        if self.due is None and newest(self.run) > self.from_step:
            self.due = now + self.pause
        return self.due is not None and now >= self.due

    def disturb(self, cluster: Cluster, back: dict[str, float], now: float) -> None:
        """Do what is due; nodes that are drained are put into `back`, with the time of their return."""
        early, step = newest(self.run) == self.from_step, newest(self.run)
        nodes = cluster.run("scontrol", "show", "hostnames", self.nodes).split()
        if self.kind in SIGNALS:
            if not cluster.signal(self.name, SIGNALS[self.kind]):
                self.due = now + 0.1  # there is no step yet
                return
        elif self.kind == "node":
            cluster.kill_node(self.draw.choice(nodes))
        else:
            if self.kind == "drain":
                node = self.draw.choice(nodes)
                cluster.run("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=chaos")
                back[node] = now + self.draw.uniform(2, 8)
            cluster.attempt("scontrol", "requeue", self.name)  # refused if it has just ended
        self.done = True
        self.made.append(Disturbance(self.kind, early, step))
        when = f"early, at step {step}" if early else f"after step {step}"
        print(f"{self.name:8} {len(self.made):11}  {self.restarts:7}  {self.kind:7}  {when}", flush=True)


def shown(cluster: Cluster) -> dict[str, dict[str, str]]:
    """What SLURM knows of each job, by JOB or ARRAY_TASK."""
    found = {}
    for line in cluster.run("scontrol", "-o", "show", "job").splitlines():
        fields = dict(re.findall(r"(?:^| )(JobId|ArrayJobId|ArrayTaskId|JobState|Restarts|NodeList)=(\S*)", line))
        if "ArrayJobId" in fields:
            found[f"{fields['ArrayJobId']}_{fields['ArrayTaskId']}"] = fields
        elif fields:
            found[fields["JobId"]] = fields
    return found


def disturb(cluster: Cluster, jobs: list[Job]) -> None:
    """Until all of them are over."""
    back: dict[str, float] = {}  # drained nodes
    moved, before = time.monotonic(), None
    while any(job.state != "COMPLETED" for job in jobs):
        cluster.look_after_the_nodes()
        found, now = shown(cluster), time.monotonic()
        for job in jobs:
            if job.name in found:
                job.look(found[job.name], now)
            if job.is_due(now):
                job.disturb(cluster, back, now)
        for node in [node for node, when in back.items() if now > when]:
            cluster.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
            del back[node]
        at = [(job.state, job.restarts, newest(job.run)) for job in jobs]
        if at != before:
            moved, before = now, at
        if now - moved > PATIENCE:
            raise Wrong(f"nothing has happened for {PATIENCE} s: {at}")
        time.sleep(0.1)


def chaos(
    cluster: Cluster, folder: Path, data: Path, layouts: list[str], number: int, at_once: int, restarts: int,
    steps: int, seed: int = 0,
) -> list[Job]:  # fmt: skip
    """Train, for each layout, once undisturbed and as an array with disturbances, in folders below this one; the jobs.

    Raises:
        Wrong: a job that should not end, or another result.
    """
    words = [*WORDS, f"trainer.max_steps={steps}", f"data.root={data}"]
    flags, start_up = {}, {}
    for layout in layouts:
        nodes, tasks = layout.split("x")
        flags[layout] = [f"--nodes={nodes}", f"--ntasks-per-node={tasks}"]
        here = folder / layout
        here.mkdir(parents=True)
        began, output, whole = time.monotonic(), here / "whole.out", here / "whole"
        job = cluster.submit(output, *flags[layout], "slurm/train.sbatch", *words, f"run_dir={whole}")
        cluster.until(lambda: newest(whole) > 0, job, output, PATIENCE)  # noqa: B023
        start_up[layout] = time.monotonic() - began
        cluster.finish(job, output, seconds=PATIENCE + steps)
        print(
            f"{layout}, undisturbed: {start_up[layout]:.0f} s to the first checkpoint, {time.monotonic() - began:.0f} s"
        )
    jobs = []
    for layout in layouts:
        here = folder / layout
        (here / "lines").write_text("".join(f"run_dir={here}/run{k}\n" for k in range(number)))
        words_of_array = [f"--array=0-{number - 1}%{at_once}", "slurm/array.sbatch", here / "lines", *words]
        array = cluster.submit(here / "run%a.out", *flags[layout], *words_of_array)
        for k in range(number):
            draw = random.Random(f"{seed} {layout} {k}")
            jobs.append(Job(f"{array}_{k}", here / f"run{k}", here / f"run{k}.out", restarts, draw, start_up[layout]))
    print("job      disturbance  restart  kind     when", flush=True)
    disturb(cluster, jobs)
    wrong = []
    for job in jobs:
        wrong += [f"{job.run}: {what}" for what in differences(job.run, job.run.with_name("whole"), steps)]
        wrong += [f"{job.output}: {line}" for line in text(job.output).splitlines() if NOISE.search(line)]
    if wrong:
        raise Wrong("\n".join(["another result, or noise:", *wrong]))
    return jobs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", default=["3x1", "2x2"], help="nodes x tasks per node")
    parser.add_argument("--jobs", type=int, default=5, help="tasks of each array")
    parser.add_argument("--at-once", type=int, default=2, help="tasks of each array that run at a time")
    parser.add_argument("--restarts", type=int, default=12, help="of each job, at least")
    parser.add_argument("--steps", type=int, help="of each training; enough for so many restarts unless given")
    parser.add_argument("--seed", type=int, default=0, help="of what is done when")
    parser.add_argument("--folder", type=Path, help="an empty one, which stays; else a temporary one")
    given = parser.parse_args()
    steps = given.steps or 15 * EVERY // 2 * (given.restarts + 1)
    sys.path.insert(0, str(ROOT))
    from diffusion.build.extractors import prepare_digits

    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        prepare_digits(folder / "digits")
        most = max(int(layout.partition("x")[0]) for layout in given.layouts)
        began = time.monotonic()
        try:
            with up(folder / "cluster", most, "--set", "KillWait=15") as cluster:
                jobs = chaos(
                    cluster, folder, folder / "digits", given.layouts, given.jobs, given.at_once, given.restarts, steps,
                    given.seed,
                )  # fmt: skip
        except (Wrong, NoCluster, AssertionError) as error:
            print(f"Wrong: {error}", file=sys.stderr)
            for output in sorted(folder.glob("*/*.out")):
                print(f"The last lines of {output}:", *text(output).splitlines()[-15:], sep="\n", file=sys.stderr)
            return 1
    made = Counter(("early " if one.early else "") + one.kind for job in jobs for one in job.made)
    print(", ".join(f"{count} x {what}" for what, count in sorted(made.items())))
    print(
        f"{len(jobs)} jobs, {min(j.restarts for j in jobs)} to {max(j.restarts for j in jobs)} restarts each, {steps} "
        f"steps, {(time.monotonic() - began) / 60:.0f} min: the same bits as undisturbed."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
