"""Make a data set: WebDataset shards and their index, where training looks for them.

    python -m diffusion.prepare source=digits                the digits of scikit-learn, with their classifier

`out` is data/NAME unless given. What is there already is left as it is.
"""

from pathlib import Path

from omegaconf import DictConfig

from diffusion.app.check import check
from diffusion.app.compose import Refusal, command, refusing

SOURCES = ("digits",)


@command("prepare")
def main(cfg: DictConfig) -> None:
    with refusing(cfg.debug):
        check(cfg)
        if cfg.source not in SOURCES:
            raise Refusal(f"source={cfg.source} is none of {', '.join(SOURCES)}.")
        from diffusion.app import build

        out = Path(cfg.out or "data/digits")
        print(f"Making {out}", flush=True)
        built, module = build.prepare_digits(out)
    print(f"{out}: {module.num_images:,} images of 8x8, 10 classes; classifier sha256 {built.digest}")


if __name__ == "__main__":
    main()
