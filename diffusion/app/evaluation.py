"""From the settings of `evaluate` to lines of results: which images, against which, by which extractor."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from diffusion.app import build
from diffusion.app.build import Place
from diffusion.app.check import check_data, check_guidance, check_number
from diffusion.app.compose import Refusal
from diffusion.data.image_files import ImageFiles
from diffusion.data.index import INDEX_NAME
from diffusion.data.module import ImageShardsDataModule
from diffusion.data.remote import is_remote
from diffusion.metrics.extractors import Features
from diffusion.metrics.reference import Reference
from diffusion.training.gallery import Gallery
from diffusion.training.ranks import Ranks
from diffusion.training.scoring import ImageSet, features_of, reference_of, save_neighbours, score

Given = ImageShardsDataModule | ImageFiles


class Evaluation:
    """Everything an evaluation needs, built and checked."""

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg, self.run_folder, self.model = cfg, None, None
        self.place = build.place(cfg.trainer)
        self.paper: dict[str, float | None] = {}
        self.real: Given | None = None
        if cfg.checkpoint is not None:
            self.model = build.trained(cfg.checkpoint, cfg.ema)
            run = self.model.config
            check_guidance(cfg.guidance.scale, run.model.num_classes, run.objective.label_dropout)
            self.paper = dict(run.paper)
            build.sampling(cfg, self.model.denoiser, self.place, self.model.image_shape, cfg.batch_size)
            if self.model.path.parent.name == "checkpoints":
                self.run_folder = self.model.path.parent.parent
            if cfg.reference is None:
                if str(run.data.root).startswith("pipe:"):
                    raise Refusal(
                        f"checkpoint={cfg.checkpoint} names the command {run.data.root} as the source of its data, and "
                        f"a file is not to say what is run here: give reference='{run.data.root}' to have it run."
                    )
                check_data(run)
                self.real = build.data(OmegaConf.merge(run, {"data": {"split": cfg.split}}))
            if cfg.extractor.name == "inception" and run.extractor.name == "digits" and run.data.channels == 1:
                cfg = self.cfg = OmegaConf.merge(cfg, {"extractor": run.extractor})
        digits = self.real if isinstance(self.real, ImageShardsDataModule) else None
        self.extractor = build.extractor(cfg, digits, self._beside())
        if self.real is None:
            self.real = self._given("reference", cfg.split)
        if self.model is None:
            self.images = self._given("images", cfg.images_split)
            check_number(cfg.metrics, len(image_set(self.images)), f"images={cfg.images}")
            size = image_size(self.images)
        else:
            size = self.model.image_shape[1:]
        self.extractor.check(self.extractor.channels if self.model is None else self.model.image_shape[0], size[0])
        if size != image_size(self.real):
            (height, width), (h, w) = size, image_size(self.real)
            raise Refusal(f"The images have {width}x{height} pixels, the reference has {w}x{h}: scores need one size.")

    def _beside(self) -> str | None:
        """The data set that the digits' extractor lies beside, if one is named."""
        reference = self.cfg.reference
        if reference is not None and (Path(reference) / INDEX_NAME).is_file():
            return reference
        return None if self.model is None else self.model.config.data.root

    def _given(self, key: str, split: str) -> Given:
        """The set that a setting names: shards, or files."""
        path = self.cfg[key]
        if is_remote(path) or (Path(path) / INDEX_NAME).is_file():
            module = ImageShardsDataModule(path, batch_size=1, split=split)
            if module.channels != self.extractor.channels:
                self.extractor.check(module.channels, module.image_size)
            return module
        if (Path(path) / "samples.npz").is_file():  # a folder that `sample` made
            path = Path(path) / "samples.npz"
        return ImageFiles(path, key, self.extractor.channels)

    def introduction(self) -> str:
        cfg = self.cfg
        if self.model is None:
            return f"Scoring {cfg.images} against {cfg.reference} with extractor={self.extractor.name}"
        against = cfg.reference or f"{self.model.config.data.root} ({self.model.config.data.name}, {cfg.split})"
        return (
            f"Scoring {cfg.num_images} images of {self.model.path} (step {self.model.step}, {self.model.weights} "
            f"weights) against {against} with extractor={self.extractor.name}"
        )

    # ---- the work, on all ranks ----

    def rows(self, ranks: Ranks, where: Place) -> list[dict[str, Any]]:
        """Sample or read, score, and say of each figure what it depends on; the rows on rank 0, none on others."""
        cfg = self.cfg
        self.extractor.network.to(where.device)
        reference = self._reference(ranks)
        if self.model is None:
            found = features_of(image_set(self.images), self.extractor, ranks)
            about: dict[str, Any] = {"images": str(cfg.images), "data": str(cfg.reference), "split": cfg.split}
            return self._scored(reference, *found, None, about, ranks) if found else []
        gallery = self._gallery(ranks, where)
        gallery.make(self.extractor)
        if not ranks.main:
            return []
        about = {**gallery.sampling.record(), "nfe": gallery.nfe(), "step": self.model.step}
        about |= {"weights": self.model.weights, "checkpoint_sha256": self.model.digest, "split": cfg.split}
        about["data"] = self.model.config.data.name if cfg.reference is None else str(cfg.reference)
        about["parameters"] = sum(p.numel() for p in self.model.denoiser.network.parameters())
        features = gallery.features(self.extractor)
        rows = self._scored(reference, features, gallery.labels(), gallery.images(cfg.neighbours), about, ranks)
        if cfg.samples is not None:
            gallery.write(Path(cfg.samples))
        gallery.remove()
        return rows

    def _reference(self, ranks: Ranks) -> Reference | None:
        if isinstance(self.real, ImageShardsDataModule):
            return build.reference(self.real, self.extractor, ranks)
        assert self.real is not None
        return reference_of(self.real, self.extractor, ranks)

    def _gallery(self, ranks: Ranks, where: Place) -> Gallery:
        cfg, model = self.cfg, self.model
        assert model is not None
        model.denoiser.network.to(where.device, memory_format=where.memory_format)
        sampling = build.sampling(cfg, model.denoiser, where, model.image_shape, cfg.batch_size, ranks)
        identity = model.identity()
        text = json.dumps([identity, sampling.identity()], sort_keys=True)
        name = "samples_" + hashlib.sha256(text.encode()).hexdigest()[:12]
        if cfg.samples is not None:
            folder = Path(cfg.samples) / ".batches"
        elif self.run_folder is not None:
            folder = self.run_folder / "evaluations" / name
        else:
            folder = (model.path if cfg.out is None else Path(cfg.out)).parent / name
        return Gallery(folder, sampling, cfg.num_images, identity, ranks)

    def _scored(
        self,
        reference: Reference | None,
        features: Features,
        labels: Tensor | None,
        images: Tensor | None,
        about: dict[str, Any],
        ranks: Ranks,
    ) -> list[dict[str, Any]]:
        cfg = self.cfg
        assert reference is not None and self.real is not None
        if isinstance(self.real, ImageFiles) and self.real.lossy:
            about = {**about, "reference_lossy": True}
        if self.model is None and isinstance(self.images, ImageFiles) and self.images.lossy:
            about = {**about, "images_lossy": True}
        rows = score(
            features, self.extractor, reference, list(cfg.metrics), about, self.paper,
            labels if cfg.per_class else None, ranks.working,
        )  # fmt: skip
        path = self._neighbours_path()
        if cfg.neighbours and path is not None:
            number = min(cfg.neighbours, len(features.pooled))
            if images is None:
                images = image_set(self.images).batch(torch.arange(number).numpy())[0]
            save_neighbours(path, images[:number], features.pooled[:number], reference, image_set(self.real))
            print(f"Nearest real images: {path}")
            rows = [{**row, "neighbours": path.name} for row in rows]
        return rows

    def _neighbours_path(self) -> Path | None:
        """Where the picture of the nearest real images goes; nowhere if the results go nowhere either."""
        if self.run_folder is not None and self.cfg.out is None:
            assert self.model is not None
            return self.run_folder / "evaluations" / f"neighbours_step_{self.model.step:08d}.png"
        return None if self.cfg.out is None else Path(self.cfg.out).parent / f"{Path(self.cfg.out).stem}_neighbours.png"


def image_set(given: Given) -> ImageSet:
    return given.samples if isinstance(given, ImageShardsDataModule) else given


def image_size(given: Given) -> tuple[int, int]:
    """(height, width)."""
    return given.image_size if isinstance(given, ImageFiles) else (given.image_size, given.image_size)
