"""What a run needs after its training, looked at before the first step: it would be a pity to fail then.

Nothing is written, and nothing takes more than a few seconds. To be called by one process of a run.
"""

import sys
from pathlib import Path

from diffusion.build.extractors import classifier_places, digit_extractor, reference_folders
from diffusion.build.run import Parts
from diffusion.config.check import check_real, refuse_blocked
from diffusion.data.module import ImageShardsDataModule
from diffusion.files import obstacle
from diffusion.metrics.metric import try_out
from diffusion.runs.folder import RunFolder


def look(run: Parts) -> None:
    """Refuse a run whose pictures, scores, logs or report could not be made when it has trained. Raises Refusal or
    ValueError."""
    folder, data = run.training.folder, run.training.data
    refuse_blocked("run_dir", folder.path, *runs_outputs(folder))
    if not run.looks.enabled:
        return
    network = run.denoiser.network
    run.recipe.sampling(run.denoiser, run.place, (network.channels, network.image_size, network.image_size))
    if not run.metrics:
        return
    extractor = run.ready
    if extractor is None and (weights := classifier_of(run)) is not None:
        extractor = digit_extractor([weights], run.choice.sha256, None)
    if extractor is not None:
        try_out(extractor, network.channels, network.image_size, run.metrics)
    if data.readable:
        check_real(run.metrics, data.num_images, f"data.root={data.root or 'null'}")
        warn_of_reference(data)


def classifier_of(run: Parts) -> Path | None:
    """The digits' classifier that a run will score with; None where it has yet to be made."""
    weights, data = run.choice.weights, run.training.data
    if weights is not None:
        return Path(weights) if Path(weights).is_file() else None
    if not data.readable:
        return None
    return next((place for place in classifier_places(data, data.root) if place.is_file()), None)


def warn_of_reference(module: ImageShardsDataModule) -> None:
    """Say it where the features of the real images can be kept nowhere."""
    folders, _ = reference_folders(module)
    blocked = [why for folder in folders if (why := obstacle(folder))]
    if len(blocked) == len(folders):
        print(
            f"warning: the features of the real images cannot be kept ({', '.join(blocked)}), and are computed again "
            f"each time they are needed. Set XDG_CACHE_HOME to a folder that can be written to.",
            file=sys.stderr,
            flush=True,
        )


def runs_outputs(folder: RunFolder) -> tuple[list[str], list[str]]:
    """(files, folders) that a run writes, by their names in its folder."""
    files = [".lock", ".results.lock", "config.yaml", "metrics.csv", "results.jsonl", "report.html"]
    files += ["checkpoints/last.ckpt", "checkpoints/best.ckpt"]
    for pattern in ("samples/*.png", "fingerprints/*.csv"):
        files += [path.relative_to(folder.path).as_posix() for path in folder.path.glob(pattern)]
    return files, ["checkpoints", "samples", "evaluations", "fingerprints", "nonfinite", "wandb"]
