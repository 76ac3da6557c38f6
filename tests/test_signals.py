"""A Ctrl-C is answered at once and a second one ends the command, whatever C++ is doing; nothing is left behind."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT

from diffusion.distributed.signals import SIGNALS, Signals, descendants, handled

FIRST = "Ctrl-C: finishing and saving the current training step. Press Ctrl-C again to stop at once.\n"
TINY = ["callbacks=none", "trainer.threads=1", "data.batch_size=8", "trainer.max_steps=3", "run_dir=run"]
# A step that stays in C for a minute, which no signal ends sooner, without holding the interpreter, as torch does.
OBJECTIVE = """
    import ctypes
    from pathlib import Path

    from diffusion.objective import Simple


    class Slow(Simple):
        steps = 0

        def _loss(self, *given):
            Slow.steps += 1
            if Slow.steps == 2:
                Path("slow").touch()
                libc, thread = ctypes.CDLL(None), ctypes.c_ulong()
                sleep, seconds = ctypes.cast(libc.sleep, ctypes.c_void_p), ctypes.c_void_p({seconds})
                libc.pthread_create(ctypes.byref(thread), None, sleep, seconds)
                libc.pthread_join(thread, None)
            return super()._loss(*given)
"""


class Started:
    """A command in a session of its own, as at a terminal: what is sent goes to all its processes."""

    def __init__(self, folder: Path, name: str, *words: str) -> None:
        env = dict(os.environ, PYTHONPATH=f"{ROOT}{os.pathsep}{folder}", OMP_NUM_THREADS="1")
        self.output = folder / f"output_{time.monotonic_ns()}"
        with open(self.output, "w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", f"diffusion.{name}", *words],
                cwd=folder, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def text(self) -> str:
        return self.output.read_text()

    def wait_for(self, event, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not event():
            assert self.process.poll() is None and time.monotonic() < end, self.text()
            time.sleep(0.02)

    def press(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)

    def ended(self, seconds: float) -> int:
        """The exit status, which comes within so many seconds; no process is left."""
        started = [self.process.pid, *descendants(self.process.pid)]
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise AssertionError(f"still there after {seconds} s:\n{self.text()}") from None
        assert gone(started), "a process is left"
        return status


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pids: list[int], seconds: float = 20) -> bool:
    """Whether they all end, within so many seconds."""
    end = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(alive, pids))


@pytest.fixture
def slowly(tmp_path, digits):
    """`slowly(seconds, *words)`: a training whose second step stays in C for so long, and is in it."""

    def start(seconds: int, *words: str) -> Started:
        (tmp_path / "slow.py").write_text(textwrap.dedent(OBJECTIVE.format(seconds=seconds)))
        (tmp_path / "slow").unlink(missing_ok=True)
        started = Started(tmp_path, "train", *TINY, f"data.root={digits}", "objective._target_=slow.Slow", *words)
        started.wait_for((tmp_path / "slow").exists)
        return started

    return start


@pytest.mark.parametrize(
    "words",
    [["data.num_workers=2"], pytest.param(["trainer=cpu", "trainer.devices=2"], marks=pytest.mark.slow)],
    ids=["workers", "ranks"],
)
def test_ctrl_c_in_a_step_in_c_is_answered_at_once_and_a_second_one_ends_it(slowly, words):
    started = slowly(60, *words)
    started.press()
    started.wait_for(lambda: FIRST in started.text(), seconds=10)
    time.sleep(0.5)  # else it is the first once more
    started.press()
    assert started.ended(10) == 130
    assert started.text().endswith(FIRST + "Stopped at once. Run the same command to continue from what is on disk.\n")


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, marks=pytest.mark.slow),
    ],
    ids=["TERM", "INT", "USR1"],
)
def test_one_signal_in_a_step_in_c_lets_it_end_and_the_run_goes_on_from_there(slowly, number, command_inside, tmp_path):
    started = slowly(3)
    started.process.send_signal(number)
    started.wait_for(lambda: "finishing and saving the current training step" in started.text(), seconds=2.5)
    assert started.ended(60) == 128 + number
    assert f"Stopped by signal {int(number)} at step 2. Run the same command to continue" in started.text()
    assert (tmp_path / "run" / "checkpoints" / "step_00000002.ckpt").is_file()


COMMANDS = {
    "train": TINY,
    "sample": ["checkpoint=run", "out=samples", "num_images=100000"],
    "evaluate": ["checkpoint=run", "num_images=100000"],
    "prepare": ["source=digits", "out=set"],
    "report": ["runs=."],
    "benchmark": ["task=overhead"],
    "lab": ["task=modes"],
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    "after", [0.3, pytest.param(1.0, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_ctrl_c_ends_a_command_that_holds_nothing_with_one_line(name, after, tmp_path):
    started = Started(tmp_path, name, *COMMANDS[name])
    try:
        started.process.wait(after)
    except subprocess.TimeoutExpired:
        # Python's own first steps are not ours: wait until ours have begun
        started.wait_for(lambda: handles(started.process.pid, signal.SIGINT) or started.process.poll() is not None)
        with contextlib.suppress(ProcessLookupError):  # it was over before
            started.press()
    status = started.ended(15)
    if status in (0, 1, 2):
        return  # it was over before
    assert status == 130 and "Traceback" not in started.text()
    assert started.text().count("Interrupted.") + started.text().count("Ctrl-C: ") == 1, started.text()


def handles(pid: int, number: int) -> bool:
    """Whether a process catches a signal with a handler of ours: all of them, and not only Python's own of SIGINT."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
    caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)
    return all(caught >> (one - 1) & 1 for one in SIGNALS)


def test_an_error_that_comes_of_an_interruption_is_not_reported(tmp_path):
    code = """
        import os, signal, time
        from diffusion.command import refusing
        from diffusion.distributed.signals import install
        install()
        with refusing():
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(60)
            finally:
                raise OSError("a child has ended")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Interrupted.\n")


def test_an_exception_that_is_swallowed_does_not_keep_a_command_alive(tmp_path):
    code = """
        import os, signal, subprocess, time
        from diffusion.distributed.signals import install
        install()
        child = subprocess.Popen(["sleep", "600"])
        print(child.pid, flush=True)
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        except SystemExit:
            time.sleep(60)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stderr) == (130, "Interrupted.\n")
    assert gone([int(done.stdout)])


# ---- the handlers alone ----


def test_what_was_there_before_is_put_back_and_importing_installs_nothing():
    before = [signal.getsignal(number) for number in SIGNALS]
    threads = threading.active_count()
    for _ in range(3):
        with Signals() as outer, Signals() as inner, handled() as there:
            assert there is inner is not outer
    assert [signal.getsignal(number) for number in SIGNALS] == before and threading.active_count() == threads
    assert signal.set_wakeup_fd(-1) == -1


def test_a_signal_is_known_while_the_main_thread_is_in_c():
    """And noted once, by the thread and by Python's handler."""
    known = []
    with Signals() as signals, signals.held():
        timer = threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        look = threading.Timer(0.6, lambda: known.append(signals.number))
        timer.start(), look.start()
        import ctypes

        libc, thread = ctypes.CDLL(None), ctypes.c_ulong()
        sleep = ctypes.cast(libc.sleep, ctypes.c_void_p)
        libc.pthread_create(ctypes.byref(thread), None, sleep, ctypes.c_void_p(1))
        libc.pthread_join(thread, None)
        timer.join(), look.join()
    assert known == [signal.SIGUSR1]


def test_in_another_thread_nothing_is_handled_and_all_goes_on():
    found = []

    def work() -> None:
        with handled() as signals, signals.held():
            found.append(signals.number)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [None]


def test_a_fork_neither_answers_nor_writes_into_its_parents_pipe():
    with Signals() as signals, signals.held([signal.SIGTERM]):
        child = os.fork()
        if not child:
            os.kill(os.getpid(), signal.SIGINT)  # ignored: its parent answers it
            os.kill(os.getpid(), signal.SIGTERM)  # held when it was forked
            os.kill(os.getpid(), signal.SIGUSR1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        time.sleep(0.1)
        assert signals.number is None and os.waitstatus_to_exitcode(status) == -signal.SIGUSR1
