"""What a run needs after its training, looked at before the first step: it would be a pity to fail then.

Nothing is written, and nothing takes more than a few seconds. To be called by one process of a run.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from diffusion.build import parts as build
from diffusion.config.check import check_number, refuse_blocked
from diffusion.errors import Refusal
from diffusion.data.shards.index import INDEX_NAME
from diffusion.data.module import ImageShardsDataModule
from diffusion.data.shards.remote import is_remote
from diffusion.files import obstacle
from diffusion.runs.folder import RunFolder

if TYPE_CHECKING:
    from diffusion.run import Run

OF_BOTH = ("fid", "kid", "precision", "recall", "nearest")  # metrics that need a number of real images too


def look(run: "Run") -> None:
    """Refuse a run whose pictures, scores, logs or report could not be made when it has trained. Raises Refusal or
    ValueError."""
    cfg = run.cfg
    refuse_blocked("run_dir", run.folder.path, *runs_outputs(run.folder))
    if cfg.logger.name == "wandb":
        check_wandb()
    if not cfg.callbacks.enabled:
        return
    shape = (cfg.data.channels, cfg.data.image_size, cfg.data.image_size)
    build.sampling(cfg, run.denoiser, run.place, shape)
    if not cfg.metrics:
        return
    extractor = run.extractor
    if extractor is None and (weights := classifier_of(cfg.extractor, run.data)) is not None:
        extractor = build.digit_extractor([weights], cfg.extractor.sha256, None)
    if extractor is not None:
        extractor.try_out(cfg.data.channels, cfg.data.image_size, cfg.metrics)
    if is_remote(run.data.root) or (Path(run.data.root) / INDEX_NAME).is_file():
        check_number([m for m in cfg.metrics if m in OF_BOTH], run.data.num_images, f"data.root={run.data.root}")
        warn_of_reference(run.data)


def classifier_of(cfg: DictConfig, module: ImageShardsDataModule) -> Path | None:
    """The digits' classifier that a run will score with; None where it has yet to be made."""
    if cfg.weights is not None:
        return Path(cfg.weights) if Path(cfg.weights).is_file() else None
    if not is_remote(module.root) and not (Path(module.root) / INDEX_NAME).is_file():
        return None
    places = build.classifier_places(module, module.root)
    return next((place for place in places if place.is_file()), None)


def warn_of_reference(module: ImageShardsDataModule) -> None:
    """Say it where the features of the real images can be kept nowhere."""
    folders, _ = build.reference_folders(module)
    blocked = [why for folder in folders if (why := obstacle(folder))]
    if len(blocked) == len(folders):
        print(
            f"warning: the features of the real images cannot be kept ({', '.join(blocked)}), and are computed again "
            f"each time they are needed. Set XDG_CACHE_HOME to a folder that can be written to.",
            file=sys.stderr,
            flush=True,
        )


def check_wandb() -> None:
    """Refuse logger=wandb where its package cannot be imported."""
    try:
        import_module("wandb")
    except Exception as error:  # of a broken installation anything
        raise Refusal(
            f"logger=wandb: the package wandb cannot be imported ({type(error).__name__}: {error}). Install it again, "
            f"or give logger=none."
        ) from error


def runs_outputs(folder: RunFolder) -> tuple[list[str], list[str]]:
    """(files, folders) that a run writes, by their names in its folder."""
    files = [".lock", ".results.lock", "config.yaml", "metrics.csv", "results.jsonl", "report.html"]
    files += ["checkpoints/last.ckpt", "checkpoints/best.ckpt"]
    for pattern in ("samples/*.png", "fingerprints/*.csv"):
        files += [path.relative_to(folder.path).as_posix() for path in folder.path.glob(pattern)]
    return files, ["checkpoints", "samples", "evaluations", "fingerprints", "nonfinite", "wandb"]
