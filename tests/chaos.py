"""Kill a training again and again, and see that it ends with the very bits of one that nothing interrupted.

    python tests/chaos.py --kills 30 [--steps N] [--seed S] [--folder DIR] [key=value ...]

A small training of the digits is started, killed at a random moment, and started again by the same command; when it has
been killed so often, it may finish. Half of the kills are SIGKILL, half SIGTERM; they come while the command starts,
between two steps or inside one, and while a checkpoint is being written. Weights, average, optimizer, metrics.csv but
for its speeds, and the fingerprints of all steps must be those of the uninterrupted run. Exit status 0 if they are,
else 1.
"""

import argparse
import csv
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from diffusion.training.fingerprint_log import compare  # noqa: E402

EVERY = 5  # steps between two checkpoints
WORDS = ["callbacks=none", "trainer=cpu", "trainer.threads=1", "data.batch_size=8", f"save.every_steps={EVERY}"]
WORDS += ["save.keep=2", "log_every=1", "fingerprint_every=1"]
SIGNALS, PHASES = (signal.SIGKILL, signal.SIGTERM), ("write", "steps", "start", "write", "steps")
STATUSES = {signal.SIGKILL: (-signal.SIGKILL,), signal.SIGTERM: (128 + signal.SIGTERM, -signal.SIGTERM)}
SPEEDS = ("train/images_per_second", "train/peak_memory_gb")
PATIENCE = 300  # seconds for anything that is waited for


class Kill(NamedTuple):
    """The signal; whether it came at the start, in the steps or during a write; the last logged step; exit status."""

    number: signal.Signals
    phase: str
    step: int
    status: int


class Wrong(Exception):
    """The run did not do what it should."""


class Training:
    """A run in a folder, as a user starts it; what it says goes to output.txt beside it.

    Args:
        folder: where the command is called. name: of the run folder there. words: of the command.
    """

    def __init__(self, folder: Path, name: str, words: list[str]) -> None:
        self.folder, self.run, self.words = folder, folder / name, [*words, f"run_dir={name}"]
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
        with open(self.folder / "output.txt", "a") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "diffusion.train", *self.words],
                cwd=self.folder, env=environment, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def checkpoints(self) -> set[str]:
        return {path.name for path in (self.run / "checkpoints").glob("step_*.ckpt")}

    def writes(self) -> bool:
        """Whether there is a checkpoint that has not got its name yet."""
        return any((self.run / "checkpoints").glob(".step_*.ckpt.*.tmp"))

    def step(self) -> int:
        """The last step of which metrics.csv has a row, 0 without one."""
        return int(rows[-1]["step"]) if (rows := metrics(self.run)) else 0

    def wait_until(self, event: Callable[[], bool]) -> None:
        """Look every half millisecond. Wrong if the process ends first, or nothing comes."""
        end = time.monotonic() + PATIENCE
        while not event():
            if self.process.poll() is not None:
                raise Wrong(f"the training ended by itself with status {self.process.returncode} at step {self.step()}")
            if time.monotonic() > end:
                raise Wrong(f"the training did not get on for {PATIENCE} s at step {self.step()}")
            time.sleep(0.0005)

    def wait_for_checkpoint(self, seconds: float = float("inf")) -> None:
        """Until there is a new checkpoint, or so many seconds are over."""
        before, end = self.checkpoints(), time.monotonic() + seconds
        self.wait_until(lambda: bool(self.checkpoints() - before) or time.monotonic() > end)

    def end(self, seconds: float = PATIENCE) -> int:
        """The exit status. Wrong if it does not come."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Wrong(f"the training did not end within {seconds:.0f} s, at step {self.step()}") from None

    def finish(self, steps: int) -> None:
        """Wait for its end, after at most so many steps. Wrong if it is none of a finished run."""
        if status := self.end(PATIENCE + 2 * steps):
            raise Wrong(f"the training ended with status {status}")

    def stop(self) -> None:
        """Leave no process behind, whatever went wrong."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def metrics(run: Path) -> list[dict[str, str]]:
    """The whole rows of metrics.csv, without its speeds."""
    if not (run / "metrics.csv").is_file():
        return []
    with open(run / "metrics.csv", newline="") as f:
        rows = [row for row in csv.DictReader(f) if None not in row.values()]
    return [{k: v for k, v in row.items() if k not in SPEEDS} for row in rows]


# ---- kills ----


def kill(training: Training, number: signal.Signals, phase: str, pause: float) -> Kill:
    """Start, wait for the phase and at most `pause` seconds more, send the signal, wait for the end.

    However fast the machine has become, the training makes no more than three checkpoints.

    Raises:
        Wrong: another exit status than that of the signal.
    """
    training.start()
    if phase != "start":
        training.wait_for_checkpoint()  # so each of these starts gets on
    if phase == "write":
        training.wait_until(training.writes)
    training.wait_for_checkpoint(pause)
    if phase != "start":
        phase = "write" if training.writes() else "steps"
    training.process.send_signal(number)
    status = training.end()
    if status not in STATUSES[number]:
        raise Wrong(f"{number.name} at step {training.step()} ({phase}) ended the training with status {status}")
    return Kill(number, phase, training.step(), status)


def kills(training: Training, number: int, seed: int, start_up: float, per_step: float) -> Iterator[Kill]:
    """So many kills, in an order and after pauses that the seed decides.

    start_up, per_step: seconds until the first checkpoint, and for a step, of a run that is not killed.
    """
    draw = random.Random(seed)
    plan = [(SIGNALS[i % 2], PHASES[i // 2 % len(PHASES)]) for i in range(number)]
    draw.shuffle(plan)
    longest = {"start": start_up, "steps": EVERY * per_step, "write": 0.01}
    for sent, phase in plan:
        yield kill(training, sent, phase, draw.uniform(0, longest[phase]))


# ---- the whole ----


def same(ours: Any, theirs: Any) -> bool:
    """Whether two checkpoints' parts are the same to the bit."""
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    if isinstance(ours, torch.Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    return ours == theirs


def differences(run: Path, whole: Path, steps: int) -> list[str]:
    """What a finished run has that the uninterrupted one has not; none if all is well."""
    ours, theirs = (torch.load(p / "checkpoints" / "last.ckpt", weights_only=True) for p in (run, whole))
    parts = ("global_step", "state_dict", "ema", "optimizer_states", "lr_schedulers")
    found = [f"{part} of the last checkpoint" for part in parts if not same(ours[part], theirs[part])]
    if theirs["global_step"] != steps:
        found.append(f"the last checkpoint is of step {theirs['global_step']}, not {steps}")
    rows = metrics(run), metrics(whole)
    if rows[0] != rows[1] or len(rows[1]) != steps:
        found.append(f"metrics.csv, {len(rows[0])} rows beside {len(rows[1])}")
    fingerprints = compare(run, whole)
    if fingerprints.steps != list(range(1, steps + 1)):
        found.append(f"fingerprints: {len(fingerprints.steps)} steps in both logs")
    return found + [f"{p.part} at step {p.step}" for p in fingerprints.partings]


def chaos(folder: Path, number: int, steps: int, seed: int = 0, words: Sequence[str] = ()) -> list[Kill]:
    """Train once as a whole and once with kills, in whole/ and killed/ of this folder; the kills made.

    Raises:
        Wrong: a start or an end that should not be, or another result.
    """
    words = [*WORDS, f"trainer.max_steps={steps}", *words]
    whole, killed = (Training(folder, name, words) for name in ("whole", "killed"))
    try:
        began = time.monotonic()
        whole.start()
        whole.wait_for_checkpoint()
        start_up = time.monotonic() - began
        whole.finish(steps)
        per_step = (time.monotonic() - began - start_up) / (steps - EVERY)
        print(f"Without a kill: first checkpoint after {start_up:.1f} s, then {1000 * per_step:.0f} ms a step")
        print("kill  signal   phase  step  status")
        made = []
        for one in kills(killed, number, seed, start_up, per_step):
            made.append(one)
            print(f"{len(made):4}  {one.number.name}  {one.phase:5}  {one.step:4}  {one.status:6}", flush=True)
        killed.start()
        killed.finish(steps)
    finally:
        whole.stop()
        killed.stop()
    if found := differences(killed.run, whole.run, steps):
        raise Wrong("another result: " + "; ".join(found))
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, help="of the training; enough for so many kills unless given")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--folder", type=Path, help="an empty one, which stays; else a temporary one")
    parser.add_argument("words", nargs="*", metavar="key=value", help="settings of the training, as data.num_workers=2")
    given = parser.parse_args()
    steps = given.steps or 3 * EVERY * (given.kills + 1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            made = chaos(folder.resolve(), given.kills, steps, given.seed, given.words)
        except Wrong as error:
            said = (folder / "output.txt").read_text().splitlines()
            print(f"Wrong: {error}.\nThe last lines of output.txt:", *said[-30:], sep="\n", file=sys.stderr)
            return 1
    phases = ", ".join(f"{n} {phase}" for phase, n in Counter(k.phase for k in made).items())
    print(f"{len(made)} kills ({phases}), {steps} steps: the same bits as without a kill.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
