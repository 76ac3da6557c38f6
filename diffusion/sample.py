"""Sample images from a trained model.

    python -m diffusion.sample checkpoint=runs/digits out=samples/digits
    python -m diffusion.sample checkpoint=runs/digits out=samples/sevens num_images=64 labels=[7] \\
        guidance=classifier_free guidance.scale=3 sampler=ancestral

Image k is a function of (seed, k) alone. `out` becomes a folder with grid.png and samples.npz (arr_0: uint8 NHWC,
arr_1: labels); png=true adds single files.
"""

import io
import shutil
from pathlib import Path

from omegaconf import DictConfig

from diffusion.app.check import check, check_guidance
from diffusion.app.compose import Refusal, command, refusing
from diffusion.files import write_atomically

FILES = ("samples.npz", "grid.png", "png")


@command("sample")
def main(cfg: DictConfig) -> None:
    with refusing(cfg.debug):
        check(cfg)
        out = Path(cfg.out)
        if out.exists() and not out.is_dir():
            raise Refusal(f"out={out} is a file: give a folder.")
        there = [name for name in FILES if (out / name).exists()]
        if there and not cfg.overwrite:
            raise Refusal(f"out={out} already holds {', '.join(there)}: give another folder, or overwrite=true.")
        if not Path(cfg.checkpoint).exists():
            raise Refusal(f"checkpoint={cfg.checkpoint}: there is no such file or run folder.")
        import numpy as np
        import torch

        from diffusion.app import build
        from diffusion.training.pictures import grid, save_png
        from diffusion.training.scoring import watched

        where = build.place(cfg.trainer)
        model = build.trained(cfg.checkpoint, where, cfg.ema)
        check_guidance(cfg.guidance.scale, model.config.model.num_classes, model.config.objective.label_dropout)
        sampling = build.sampling(cfg, model.denoiser, where, model.image_shape, cfg.batch_size, list(cfg.labels))
    steps = len(sampling.times) - 1
    print(
        f"Sampling {cfg.num_images} images with {sampling.about['sampler']}, {steps} steps, from {model.path} "
        f"(step {model.step}, {model.weights} weights)",
        flush=True,
    )
    shutil.rmtree(out / "png", ignore_errors=True)  # of an earlier run, with overwrite=true
    numbers = torch.arange(cfg.num_images)
    images = torch.cat(list(watched("sampling", cfg.num_images, sampling.batches(numbers))))
    given = sampling.labels_of(numbers)
    arrays = {"arr_0": images.permute(0, 2, 3, 1).numpy()}
    if given is not None:
        arrays["arr_1"] = given.numpy()
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    if cfg.png:
        for k, image in enumerate(images):
            save_png(grid(image[None], gap=0, smallest=1), out / "png" / f"{k:06d}.png")
    save_png(grid(images[: cfg.grid_images], model.columns(len(images[: cfg.grid_images]))), out / "grid.png")
    write_atomically(out / "samples.npz", buffer.getvalue())
    print(f"{out / 'grid.png'}\n{out / 'samples.npz'}: arr_0 uint8 {arrays['arr_0'].shape}")


if __name__ == "__main__":
    main()
