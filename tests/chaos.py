"""Kill a training again and again, and see that it ends with the very bits of one that nothing interrupted.

    python tests/chaos.py --kills 200 --seed 1 [--steps N] [--folder DIR] [key=value ...]

A small training of the digits, with two loader workers, held-out losses, grids and scores, is made once as a whole.
Then it is started, killed at a random moment, and started again by the same command, until it is finished; and again in
a new folder, until it has been killed so often. Half of the kills are SIGKILL, the others SIGTERM, SIGINT and SIGUSR1.
One third of the kills come while a file is written and one third while the command starts. The others come during a
step, a look, or the final scores.

Whenever the training has finished, all this must be that of the whole one, to the byte: weights, average, optimizer and
counters in the last checkpoint, the files that are there, metrics.csv but for its speeds, results.jsonl, all
pictures, and the fingerprints of all steps. Exit status 0 if it is, else 1.
"""

import argparse
import csv
import itertools
import os
import random
import shutil
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

from diffusion.distributed.signals import descendants  # noqa: E402
from diffusion.training.fingerprint_log import compare  # noqa: E402

STEPS, EVERY = 40, 5  # of the training; between two checkpoints
WORDS = ["trainer=cpu", "trainer.threads=1", "data.batch_size=8", "data.num_workers=2", f"save.every_steps={EVERY}"]
WORDS += ["save.keep=2", "log_every=2", "fingerprint_every=1", "sampler.num_steps=4"]
WORDS += ["callbacks.grid.every_steps=10", "callbacks.grid.num_images=20", "callbacks.grid.batch_size=10"]
WORDS += ["callbacks.score.every_steps=15", "callbacks.score.num_images=40", "callbacks.score.batch_size=20"]
WORDS += ["callbacks.score.during.num_images=30", "callbacks.score.during.num_steps=2"]
WORDS += ["data=digits_held_out", "held_out.every_steps=10", "held_out.num_images=200", "held_out.batch_size=40"]
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PHASES = ("write", "start", "work")
SPEEDS = ("train/images_per_second", "train/peak_memory_gb")
PATIENCE = 300  # seconds for anything that is waited for
LONGEST_WRITE = 0.02  # seconds


class Kill(NamedTuple):
    """The signal; whether it came in a write, at the start, in a look or in the steps; the last logged step; status."""

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
        self.start_up = self.work = (
            0.0  # seconds until its first checkpoint when last started, and from there to its end
        )

    def start(self) -> None:
        self.began = time.monotonic()
        environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
        with open(self.folder / "output.txt", "a") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "diffusion.train", *self.words],
                cwd=self.folder, env=environment, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def checkpoints(self) -> set[str]:
        return {path.name for path in (self.run / "checkpoints").glob("step_*.ckpt")}

    def writes(self) -> bool:
        """Whether there is a file that has not got its name yet."""
        try:
            made = list((self.run / "evaluations").glob("*"))
        except FileNotFoundError:  # removed a moment ago
            made = []
        folders = [self.run, self.run / "checkpoints", self.run / "samples", *made]
        return any(name.endswith(".tmp") for folder in folders for name in listed(folder))

    def looks(self) -> bool:
        """Whether images are being made."""
        return bool(listed(self.run / "evaluations"))

    def python_itself_was_interrupted(self) -> bool:
        """Whether a Ctrl-C came before the interpreter had begun with the command, which then cannot answer it: its
        traceback leads through no file of this checkout."""
        said = (self.folder / "output.txt").read_text().splitlines()[-30:]
        trace = said[max((k for k, line in enumerate(said) if line.startswith("Traceback")), default=0) :]
        files = [line for line in trace if line.startswith('  File "')]
        return trace[-1] == "KeyboardInterrupt" and not any(str(ROOT) in line for line in files)

    def step(self) -> int:
        """The last step of which metrics.csv has a row, 0 without one."""
        return int(rows[-1][0]) if (rows := metrics(self.run)[1:]) else 0

    def wait_until(self, event: Callable[[], bool], seconds: float = PATIENCE) -> bool:
        """Look every half millisecond, for at most so long; whether the event came before the end of the process."""
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end:
            if event():
                return True
            time.sleep(0.0005)
        return False

    def wait_for_checkpoint(self, seconds: float = PATIENCE) -> None:
        """Until there is a new checkpoint, or so many seconds are over."""
        before = self.checkpoints()
        if self.wait_until(lambda: bool(self.checkpoints() - before), seconds):
            self.start_up = time.monotonic() - self.began

    def end(self, seconds: float = PATIENCE) -> int:
        """The exit status. Wrong if it does not come."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Wrong(f"the training did not end within {seconds:.0f} s, at step {self.step()}") from None

    def finish(self) -> None:
        """Start, and wait for the end. Wrong if it is none of a finished run."""
        self.start()
        self.wait_for_checkpoint()
        if status := self.end():
            raise Wrong(f"the training ended with status {status}")
        self.work = time.monotonic() - self.began - self.start_up

    def stop(self) -> None:
        """Leave no process behind, whatever went wrong."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def listed(folder: Path) -> list[str]:
    """The names in a folder; none if it is not there."""
    try:
        return os.listdir(folder)
    except OSError:
        return []


def metrics(run: Path) -> list[list[str]]:
    """The lines of metrics.csv, names first, without its speeds and without a line that a kill has cut off."""
    if not (run / "metrics.csv").is_file():
        return []
    with open(run / "metrics.csv", newline="") as f:
        rows = list(csv.reader(f))
    kept = [k for k, name in enumerate(rows[0]) if name not in SPEEDS] if rows else []
    return [[row[k] for k in kept] for row in rows if len(row) == len(rows[0])]


# ---- kills ----


def kill(training: Training, number: signal.Signals, phase: str, share: float) -> Kill | None:
    """Start, wait for the phase and a share of its length, send the signal, wait for the end; None if the training has
    finished before.

    Raises:
        Wrong: another exit status than that of the signal, or a process of it is left.
    """
    training.start()
    if phase == "start":
        training.wait_for_checkpoint(share * training.start_up)
    elif phase == "work":
        training.wait_for_checkpoint()
        training.wait_until(lambda: False, share * training.work / 2)
    else:
        pause = share * LONGEST_WRITE
        while training.wait_until(training.writes):
            time.sleep(pause)
            if training.writes():
                break
            pause /= 2  # it was over before
    if phase != "start":
        phase = "write" if training.writes() else "look" if training.looks() else "steps"
    children = descendants(training.process.pid)
    if training.process.poll() is None:
        training.process.send_signal(number)
    status = training.end()
    if status == 0:
        return None
    if status not in (-number, 128 + number) and not training.python_itself_was_interrupted():
        raise Wrong(f"{number.name} at step {training.step()} ({phase}) ended the training with status {status}")
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in children):
        if time.monotonic() > deadline:
            raise Wrong(f"{number.name} at step {training.step()} ({phase}) left a process behind")
        time.sleep(0.05)
    return Kill(number, phase, training.step(), status)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def plan(number: int, seed: int) -> Iterator[tuple[signal.Signals, str, float]]:
    """So many kills: the signal, the phase, and after what share of it."""
    draw = random.Random(seed)
    sent = [signal.SIGKILL if i % 2 else SIGNALS[i // 2 % len(SIGNALS)] for i in range(number)]
    phases = [PHASES[i % len(PHASES)] for i in range(number)]
    draw.shuffle(sent)
    draw.shuffle(phases)
    for one, phase in zip(sent, phases, strict=True):
        yield one, phase, draw.random()


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


def files(run: Path) -> dict[str, bytes]:
    """What else must be the same: results.jsonl and the pictures, and the names of all files but those of the loggers,
    whose content is another matter. Of the checkpoints that last.ckpt and best.ckpt do not point to only the number: a
    stop saves one between those of save.every_steps, and it is among the newest, which stay."""
    found, pointed = {}, {path.resolve().stem for path in run.glob("checkpoints/*") if path.is_symlink()}
    others = sorted({path.stem for path in run.glob("checkpoints/step_*")} - pointed)
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        if path.parent.name == "checkpoints" and path.stem in others:
            name = f"checkpoints/older_{others.index(path.stem)}{path.suffix}"
        whole = name == "results.jsonl" or path.suffix == ".png"
        found[name] = path.read_bytes() if whole else os.readlink(path).encode() if path.is_symlink() else b""
    return found


def differences(run: Path, whole: Path, steps: int) -> list[str]:
    """What a finished run has that the uninterrupted one has not; none if all is well."""
    ours, theirs = (torch.load(p / "checkpoints" / "last.ckpt", weights_only=True) for p in (run, whole))
    parts = ("global_step", "state_dict", "ema", "optimizer_states", "lr_schedulers", "counts")
    found = [f"{part} of the last checkpoint" for part in parts if not same(ours[part], theirs[part])]
    if theirs["global_step"] != steps:
        found.append(f"the last checkpoint is of step {theirs['global_step']}, not {steps}")
    rows = metrics(run), metrics(whole)
    if rows[0] != rows[1] or len(rows[1]) < 2:
        found.append(f"metrics.csv, {len(rows[0])} lines beside {len(rows[1])}")
    fingerprints = compare(run, whole)
    if fingerprints.steps != list(range(1, steps + 1)):
        found.append(f"fingerprints: {len(fingerprints.steps)} steps in both logs")
    left, right = files(run), files(whole)
    found += [f"file {name}" for name in left.keys() | right.keys() if left.get(name) != right.get(name)]
    return found + [f"{p.part} at step {p.step}" for p in fingerprints.differences]


def chaos(folder: Path, number: int, steps: int = STEPS, seed: int = 0, words: Sequence[str] = ()) -> list[Kill]:
    """Train once as a whole, in whole/ of this folder, and with kills in killed_001/ and so on, each compared with the
    first when it is finished, and removed but for the last. The kills made.

    Raises:
        Wrong: a start or an end that should not be, or another result.
    """
    words = [*WORDS, f"trainer.max_steps={steps}", *words]
    whole, made = Training(folder, "whole", words), []
    training = whole
    try:
        whole.finish()
        print(f"Without a kill: first checkpoint after {whole.start_up:.1f} s, the end {whole.work:.1f} s later")
        print("kill  signal   phase  step  status", flush=True)
        kills = plan(10 * number, seed)
        for turn in itertools.count(1):
            training = Training(folder, f"killed_{turn:03d}", words)
            training.start_up, training.work = whole.start_up, whole.work
            while len(made) < number and (one := kill(training, *next(kills))) is not None:
                made.append(one)
                print(f"{len(made):4}  {one.number.name:7}  {one.phase:5}  {one.step:4}  {one.status:6}", flush=True)
            if training.process is None or training.process.returncode:
                training.finish()
            if found := differences(training.run, whole.run, steps):
                raise Wrong(f"another result in {training.run.name}: " + "; ".join(found))
            print(f"{training.run.name}: the same", flush=True)
            if len(made) == number:
                return made
            shutil.rmtree(training.run)
    finally:
        whole.stop()
        training.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=STEPS, help="of the training")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--folder", type=Path, help="an empty one, which stays; else a temporary one")
    parser.add_argument("words", nargs="*", metavar="key=value", help="settings of the training, as data.num_workers=0")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            made = chaos(folder.resolve(), given.kills, given.steps, given.seed, given.words)
        except Wrong as error:
            said = (folder / "output.txt").read_text().splitlines()
            print(f"Wrong: {error}.\nThe last lines of output.txt:", *said[-30:], sep="\n", file=sys.stderr)
            return 1
        said = (folder / "output.txt").read_text().splitlines()
        traces = [k for k, line in enumerate(said) if line.startswith("Traceback") and '"<frozen' not in said[k + 1]]
    counted = [Counter(k.phase for k in made), Counter(k.number.name for k in made)]
    phases, sent = (", ".join(f"{n} {name}" for name, n in sorted(count.items())) for count in counted)
    print(f"{len(made)} kills ({phases}; {sent}), {given.steps} steps: the same bytes as without a kill.")
    if traces:
        print(f"But {len(traces)} tracebacks in output.txt.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
