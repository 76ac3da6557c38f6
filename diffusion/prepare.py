"""Create a data set: WebDataset shards and their index, in the folder where training looks for them.

    python -m diffusion.prepare source=digits                                         the digits of scikit-learn
    python -m diffusion.prepare source=church_outdoor_train_lmdb dataset=lsun_church  LSUN as it is distributed
    python -m diffusion.prepare source=cifar-10-python.tar.gz dataset=cifar10         either archive of CIFAR-10
    python -m diffusion.prepare source=img_align_celeba.zip dataset=celeba_64
    python -m diffusion.prepare source=cats.zip image_size=64                         images of your own
    python -m diffusion.prepare task=verify dataset=lsun_church                       check a finished set for damage

`out` is data/NAME unless it is given. If it is interrupted, the same command continues. A finished set is not changed.
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from diffusion.distributed.signals import install

    install()

import sys

from omegaconf import DictConfig

from diffusion.build.prepare import (
    check_prepare,
    introduction,
    job_of,
    name_of,
    out_of,
    processes_of,
    report,
    train_command,
    verdict,
)  # fmt: skip
from diffusion.command import command, refusing
from diffusion.config.check import check
from diffusion.config.effect import typed
from diffusion.data.prepare.plan import planned
from diffusion.data.prepare.shards import make_set, refuse_other, settings_of
from diffusion.data.prepare.verify import verify_set
from diffusion.data.shards.index import read_index
from diffusion.files import Room, writing
from diffusion.progress import Progress


@command("prepare")
def main(cfg: DictConfig) -> None:
    with refusing(cfg.debug):
        check(cfg, typed())
        check_prepare(cfg)
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
        with Progress("preparing", sum(plan.counts.values()), begun=None) as progress:
            summary = make_set(job, plan, processes_of(cfg), progress.to)
    print(report(job, summary, train_command(cfg, job)))


def verify(cfg: DictConfig) -> int:
    """task=verify; 0 if all is well, else 1."""
    with refusing(cfg.debug):
        out = out_of(cfg)
        total = sum(shard.samples for shard in read_index(out).shards)
        print(f"Verifying {out}: {total:,} images", flush=True)
        with Progress("verifying", total, begun=None) as progress:
            index, wrong = verify_set(out, processes_of(cfg), progress.to)
    print(verdict(index, wrong), file=sys.stderr if wrong else sys.stdout)
    return 1 if wrong else 0


def digits(cfg: DictConfig) -> None:
    """The data set that is on every machine, and its classifier."""
    with refusing(cfg.debug):
        from diffusion.build.extractors import prepare_digits
        from diffusion.data.digit_sets import BYTES, write_missing_digits

        out, name = out_of(cfg), name_of(cfg)
        print(f"Making {out}", flush=True)
        with writing(Room("out", out, BYTES, "the digits and their classifier")):
            write_missing_digits(out, name)
            built, module = prepare_digits(out, name)
    counts = ", ".join(f"{module.index.count(split):,} of split {split}" for split in module.index.splits)
    print(f"{out}: {counts}: 8x8 pixels, 10 classes; classifier sha256 {built.digest}")
    words = ["" if name == "digits" else f" data={name} name={name}", "" if cfg.out is None else f" data.root={out}"]
    print(f"Train on it: python -m diffusion.train{''.join(words)}")


if __name__ == "__main__":
    main()
