"""From the settings of `evaluate` to lines of results: which images, against which, by which extractor."""

from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor

from diffusion.app import build
from diffusion.app.check import check_data, check_guidance
from diffusion.app.compose import Refusal
from diffusion.data.index import INDEX_NAME
from diffusion.data.module import ImageShardsDataModule
from diffusion.data.remote import is_remote
from diffusion.metrics.extractors import Features
from diffusion.training.scoring import score, stored, watched

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def read_images(given: str, key: str, channels: int) -> Tensor:
    """An .npz (arr_0: uint8 NHWC) or a folder of pictures, in the order of their names -> uint8 (N, C, H, W).

    Nothing is unpickled. ValueError for anything else, no images, or images of several sizes.
    """
    path = Path(given)
    if (path / "samples.npz").is_file():  # a folder that `sample` made
        path = path / "samples.npz"
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in PICTURES)
        if not files:
            raise Refusal(f"{key}={path} holds no pictures ({', '.join(PICTURES)}).")
        found = []
        for file in files:
            with Image.open(file) as picture:
                found.append(np.asarray(picture.convert("L" if channels == 1 else "RGB")))
        sizes = {f.shape[:2] for f in found}
        if len(sizes) > 1:
            raise Refusal(f"{key}={path} holds pictures of {len(sizes)} sizes, as {sorted(sizes)[:2]}: one is needed.")
        pixels = np.stack(found)
        pixels = pixels[..., None] if pixels.ndim == 3 else pixels
    else:
        try:
            with np.load(path, allow_pickle=False) as archive:
                pixels = archive["arr_0"]
        except (ValueError, KeyError, OSError, EOFError, BadZipFile) as e:
            raise Refusal(f"{key}={path} is no .npz with uint8 images in arr_0 ({e}).") from e
        if pixels.dtype != np.uint8 or pixels.ndim != 4:
            raise Refusal(f"{key}={path}: arr_0 is {pixels.dtype} {pixels.shape}, expected uint8 (N, H, W, C).")
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))


class Evaluation:
    """Everything an evaluation needs, built and checked."""

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg, self.run_folder, self.model, self.module = cfg, None, None, None
        self.place = build.place(cfg.trainer)
        self.paper: dict[str, float | None] = {}
        if cfg.checkpoint is not None:
            self.model = build.trained(cfg.checkpoint, self.place, cfg.ema)
            run = self.model.config
            check_guidance(cfg.guidance.scale, run.model.num_classes, run.objective.label_dropout)
            self.paper = dict(run.paper)
            self.sampling = build.sampling(cfg, self.model.denoiser, self.place, self.model.image_shape, cfg.batch_size)
            if self.model.path.parent.name == "checkpoints":
                self.run_folder = self.model.path.parent.parent
            if cfg.reference is None:
                if str(run.data.root).startswith("pipe:"):
                    raise Refusal(
                        f"checkpoint={cfg.checkpoint} names the command {run.data.root} as the source of its data, and "
                        f"a file is not to say what is run here: give reference='{run.data.root}' to have it run."
                    )
                check_data(run)
                self.module = build.data(run)
            if cfg.extractor.name == "inception" and run.extractor.name != "inception" and run.data.channels != 3:
                cfg = self.cfg = OmegaConf.merge(cfg, {"extractor": run.extractor})
        self.extractor = build.extractor(cfg, self.place, self.module, beside=cfg.reference)
        if self.model is not None:
            self.extractor.check(*self.model.image_shape[:2])

    def introduction(self) -> str:
        cfg = self.cfg
        if self.model is None:
            return f"Scoring {cfg.images} against {cfg.reference} with extractor={self.extractor.name}"
        against = cfg.reference or f"{self.model.config.data.root} ({self.model.config.data.name})"
        return (
            f"Scoring {cfg.num_images} images of {self.model.path} (step {self.model.step}, {self.model.weights} "
            f"weights) against {against} with extractor={self.extractor.name}"
        )

    def reference(self) -> Features:
        """Features of the real images."""
        if self.module is not None:
            return self.extractor(stored(self.module.samples))
        root = self.cfg.reference
        if is_remote(root) or (Path(root) / INDEX_NAME).is_file():
            return self.extractor(stored(ImageShardsDataModule(root, batch_size=1).samples))
        return self.extractor([read_images(self.cfg.reference, "reference", self.extractor.channels)])

    def rows(self) -> list[dict[str, Any]]:
        """Sample or read, score, and say of each figure what it depends on."""
        cfg = self.cfg
        if self.model is None:
            images = [read_images(cfg.images, "images", self.extractor.channels)]
            about: dict[str, Any] = {"images": str(cfg.images), "data": str(cfg.reference)}
        else:
            batches = self.sampling.batches(torch.arange(cfg.num_images))
            images = watched("sampling", cfg.num_images, batches)
            about = {"step": self.model.step, "weights": self.model.weights}
            about["data"] = self.model.config.data.name if cfg.reference is None else str(cfg.reference)
            about["parameters"] = sum(p.numel() for p in self.model.denoiser.network.parameters())

        def record(number: int) -> dict[str, Any]:
            return about if self.model is None else {**self.sampling.record(number), **about}

        return score(images, self.extractor, self.reference(), list(cfg.metrics), record, self.paper)
