"""Make a data set: WebDataset shards and their index, where training looks for them.

    python -m diffusion.prepare source=digits                                         the digits of scikit-learn
    python -m diffusion.prepare source=church_outdoor_train_lmdb dataset=lsun_church  LSUN as it is distributed
    python -m diffusion.prepare source=cifar-10-python.tar.gz dataset=cifar10         either archive of CIFAR-10
    python -m diffusion.prepare source=img_align_celeba.zip dataset=celeba_64
    python -m diffusion.prepare source=cats.zip image_size=64                         any images of one's own
    python -m diffusion.prepare task=verify dataset=lsun_church                       is it still as it was made?

`out` is data/NAME unless given. Stopped in the middle, the same command goes on; a finished set is left as it is.
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from diffusion.distributed.signals import install

    install()

import sys
import time

from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from diffusion.build.prepare import (
    check_prepare,
    introduction,
    job_of,
    out_of,
    processes_of,
    report,
    train_command,
    verdict,
)  # fmt: skip
from diffusion.config.check import check
from diffusion.config.compose import command, refusing, typed
from diffusion.data.prepare.plan import planned
from diffusion.data.prepare.shards import make_set, refuse_other, settings_of
from diffusion.data.prepare.verify import verify_set
from diffusion.data.shards.index import read_index
from diffusion.files import Room, writing


class Progressing:
    """Images done, their rate, and the time left: a bar at a terminal, else a line now and then."""

    def __init__(self, verb: str, total: int, seconds: float = 10.0) -> None:
        self.verb, self.total, self.seconds = verb, total, seconds
        self._first: tuple[int, float] | None = None
        self._printed = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> "Progressing":
        return self

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = (done, now)
            console = Console(stderr=True)
            if console.is_terminal:
                columns = [TextColumn(self.verb), BarColumn(), TextColumn("{task.completed:,}/{task.total:,} images")]
                columns += [TextColumn("{task.fields[rate]}"), TimeElapsedColumn(), TextColumn("left")]
                self._bar = Progress(*columns, TimeRemainingColumn(), console=console, auto_refresh=False)
                self._task = self._bar.add_task("", total=self.total, completed=done, rate="")
                self._bar.start()
        rate = (done - self._first[0]) / max(now - self._first[1], 1e-9)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, rate=f"{rate:,.0f}/s", refresh=True)
        elif now - self._printed >= self.seconds:
            left = (self.total - done) / rate if rate else 0
            text = f"{self.verb} {done:,}/{self.total:,} images  {rate:,.0f}/s  {left / 60:,.1f} min left"
            print(text, file=sys.stderr, flush=True)
            self._printed = now

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


@command("prepare")
def main(cfg: DictConfig) -> None:
    with refusing(cfg.debug):
        check_prepare(cfg)
        check(cfg, typed())
    if cfg.task == "verify":
        sys.exit(verify(cfg))
    if cfg.source == "digits":
        digits(cfg)
        return
    with refusing(cfg.debug):
        job = job_of(cfg)
        plan = planned(job)
        finished = refuse_other(job.out, settings_of(job, plan))
        print(f"{job.out} is there already." if finished else introduction(job, plan), flush=True)
        with Progressing("preparing", sum(plan.counts.values())) as progress:
            summary = make_set(job, plan, processes_of(cfg), progress)
    print(report(job, summary, train_command(cfg, job)))


def verify(cfg: DictConfig) -> int:
    """task=verify; 0 if all is well, else 1."""
    with refusing(cfg.debug):
        out = out_of(cfg)
        total = sum(shard.samples for shard in read_index(out).shards)
        print(f"Verifying {out}: {total:,} images", flush=True)
        with Progressing("verifying", total) as progress:
            index, wrong = verify_set(out, processes_of(cfg), progress)
    print(verdict(index, wrong), file=sys.stderr if wrong else sys.stdout)
    return 1 if wrong else 0


def digits(cfg: DictConfig) -> None:
    """The data set that is on every machine, and its classifier."""
    with refusing(cfg.debug):
        from diffusion.build import parts as build
        from diffusion.data.digits import DIGITS_BYTES, write_missing_digits

        out = out_of(cfg)
        print(f"Making {out}", flush=True)
        with writing(Room("out", out, DIGITS_BYTES, "the digits and their classifier")):
            write_missing_digits(out)
            built, module = build.prepare_digits(out)
    print(f"{out}: {module.num_images:,} images of 8x8, 10 classes; classifier sha256 {built.digest}")
    print(f"Train on it: python -m diffusion.train{'' if cfg.out is None else f' data.root={out}'}")


if __name__ == "__main__":
    main()
