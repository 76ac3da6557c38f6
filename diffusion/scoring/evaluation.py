"""From the settings of `evaluate` to lines of results: which images, against which, by which extractor."""

import hashlib
import json
from pathlib import Path
from typing import Any, Self

import numpy as np
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from diffusion.build import door
from diffusion.build import parts as build
from diffusion.build.parts import Place
from diffusion.config.check import FROM_MODEL, check_guidance, check_number
from diffusion.config.compose import typed
from diffusion.data.image_files import ImageFiles
from diffusion.data.module import ImageShardsDataModule
from diffusion.data.shards.index import INDEX_NAME
from diffusion.data.shards.remote import is_remote
from diffusion.distributed.ranks import Ranks
from diffusion.errors import Refusal
from diffusion.files import Room, obstacle
from diffusion.metrics.extractors import Features
from diffusion.metrics.published import counterpart, places
from diffusion.metrics.reference import Reference
from diffusion.page import sweep_figure, sweep_table_text, told
from diffusion.page.sweep import read_sweep, write_sweep
from diffusion.runs.folder import RunFolder
from diffusion.scoring.bits import Bits
from diffusion.scoring.bits import Settings as BitsSettings
from diffusion.scoring.gallery import Gallery, listed
from diffusion.scoring.pieces import Pieces
from diffusion.scoring.sampling import Sampling
from diffusion.scoring.scores import ImageSet, describe, features_of, reference_of, save_neighbours, score

TERMS = "terms_*"  # of a likelihood
Given = ImageShardsDataModule | ImageFiles


class Evaluation:
    """Everything an evaluation needs, built and checked."""

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg, self.run_folder, self.model = cfg, None, None
        self.place = build.place(cfg.trainer)
        self.paper: dict[str, float | None] = {}
        self._pieces: list[Pieces] = []  # what the rows are made from
        self._galleries: list[Gallery] = []  # whose samples are to be written
        self.scored = bool(set(cfg.metrics) - set(FROM_MODEL)) or cfg.task == "sweep"
        if cfg.checkpoint is not None:
            self._load()
        if self.scored:
            self._prepare_scores()
        if self.run_folder is None and cfg.out is None:
            kind = "FOLDER, for sweep.csv and sweep.png" if cfg.task == "sweep" else "FILE, for the results"
            raise Refusal(f"out={kind}, is needed: there is no run folder that they could go to.")

    def _load(self) -> None:
        """The model, and that what is asked of it can be done."""
        cfg = self.cfg
        self.model = door.trained(cfg.checkpoint, cfg.ema)
        check_guidance(cfg.guidance.scale, self.model.num_classes, self.model.label_dropout)
        self.paper = self.model.paper
        chosen = sweep_points(cfg) if cfg.task == "sweep" else [cfg]
        for point in chosen if self.scored else ():
            build.sampling(point, self.model.denoiser, self.place, self.model.image_shape, cfg.batch_size)
        self.run_folder = self.model.run_folder
        if self.run_folder is not None and cfg.out is None:
            RunFolder(self.run_folder).refuse_links()
        if "bits_per_dim" in cfg.metrics and cfg.task == "score":
            self.likelihood_data = self._likelihood_data()
            self.bits(self.place, Ranks())
        given = cfg.extractor.weights is not None or "target" in cfg.extractor or "extractor" in typed().options
        if not given and cfg.extractor.name == "inception" and self.model.config.at("extractor.name") == "digits":
            own = {"name": "digits", "weights": None, "sha256": None}  # by name: its paths are the checkpoint's
            self.cfg = OmegaConf.merge(cfg, {"extractor": own})

    def _prepare_scores(self) -> None:
        """The extractor, the real images and, without a model, those that are scored."""
        cfg, self.real = self.cfg, None
        if cfg.reference is None:
            self.real = door.data_of(self.model, cfg.data.root, cfg.split)
        self.extractor = build.extractor(cfg, self.real, self._beside())
        if self.real is None:
            self.real = self._given("reference", cfg.split)
        if self.model is None:
            self.images = self._given("images", cfg.images_split)
            check_number(cfg.metrics, len(image_set(self.images)), f"images={cfg.images}")
            size = image_size(self.images)
        else:
            self.extractor.check(*self.model.image_shape[:2])
            size = self.model.image_shape[1:]
        self.extractor.try_out(self.extractor.channels, size[0], ["fid"] if cfg.task == "sweep" else cfg.metrics)
        of_both = [metric for metric in cfg.metrics if metric not in ("is", *FROM_MODEL)]
        check_number(of_both, len(image_set(self.real)), f"reference={cfg.reference or self.real.root}")
        if cfg.per_class:
            if not (self.model.num_classes if self.model is not None else labelled(self.images)):
                what = f"images={cfg.images}" if self.model is None else f"the model of checkpoint={cfg.checkpoint}"
                raise Refusal(f"per_class=true: {what} has no classes.")
            if not labelled(self.real):
                raise Refusal(f"per_class=true: reference={cfg.reference or self.real.root} has no labels.")
        if size != image_size(self.real):
            (height, width), (h, w) = size, image_size(self.real)
            raise Refusal(f"The images have {width}x{height} pixels, the reference has {w}x{h}: scores need one size.")

    def _likelihood_data(self) -> ImageShardsDataModule:
        """The split that bits per dimension are of, of the model's data set or of the reference, if that is one."""
        wanted, reference = self.cfg.likelihood.split, self.cfg.reference
        if reference is None:
            of = lambda split: door.data_of(self.model, self.cfg.data.root, split)  # noqa: E731
        elif is_remote(reference) or (Path(reference) / INDEX_NAME).is_file():
            of = lambda split: ImageShardsDataModule(reference, batch_size=1, split=split)  # noqa: E731
        else:
            raise Refusal(f"metrics=[bits_per_dim] needs a data set; reference={reference} is none.")
        there = of(None if reference is None else "train").index.splits
        split = wanted or ("test" if "test" in there else "train")
        if split not in there:
            raise Refusal(f"likelihood.split={split} is none of the splits of the data set, {', '.join(there)}.")
        return of(split)

    def _beside(self) -> str | None:
        """The data set that the digits' extractor lies beside, if one is named."""
        for given in (self.cfg.reference, self.cfg.images):
            if given is not None and (Path(given) / INDEX_NAME).is_file():
                return given
        return None if self.model is None else self.cfg.data.root or self.model.config.at("data.root")

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
        """What is about to be done, in a line or two."""
        cfg, lines = self.cfg, []
        if self.model is None:
            return f"Scoring {cfg.images} against {cfg.reference} with extractor={self.extractor.name}"
        model = f"{self.model.path} (step {self.model.step}, {self.model.weights} weights)"
        if self.scored:
            against = cfg.reference or f"{self.real.root} ({self.model.data_name}, {cfg.split})"
            lines.append(
                f"Scoring {cfg.num_images} images of {model} against {against} with extractor={self.extractor.name}"
            )
        if "bits_per_dim" in cfg.metrics and cfg.task == "score":
            bits = self.bits(self.place, Ranks())
            lines.append(
                f"Bits per dimension of {len(bits.numbers())} images of {bits.data}, split "
                f"{bits.module.split}, by {'the bound' if cfg.likelihood.by == 'bound' else 'the flow'} of {model}"
            )
        return "\n".join(lines)

    # ---- the work, on all ranks ----

    def rows(self, ranks: Ranks, where: Place) -> list[dict[str, Any]]:
        """Sample or read, score, and say of each figure what it depends on; the rows on rank 0, none on others."""
        metrics, rows = [m for m in self.cfg.metrics if m not in FROM_MODEL], []
        if metrics:
            self.extractor.network.to(where.device)
            reference = self._reference(ranks)
            if self.model is None:
                found = features_of(image_set(self.images), self.extractor, ranks)
                about: dict[str, Any] = {"images": str(self.cfg.images), "data": str(self.cfg.reference)}
                about |= {"split": self.cfg.split}
                if found:
                    shown = np.arange(min(self.cfg.neighbours, len(found[0].pooled)))
                    images = image_set(self.images).batch(shown)[0] if len(shown) else None
                    rows = self._scored(metrics, reference, *found, images, about, ranks)
            else:
                rows = self.sampled(self.cfg, metrics, reference, ranks, where)
        if "bits_per_dim" in self.cfg.metrics:
            rows += self._bits_per_dim(ranks, where)
        return rows

    def sampled(
        self, cfg: DictConfig, metrics: list[str], reference: Reference | None, ranks: Ranks, where: Place
    ) -> list[dict[str, Any]]:
        """Scores of samples by cfg's sampler; on rank 0."""
        self.model.denoiser.network.to(where.device, memory_format=where.memory_format)
        gallery = self.gallery(cfg, ranks, where)
        self._kept_until_the_end(gallery.pieces)
        gallery.make(self.extractor)
        if not ranks.main:
            return []
        about = {**gallery.record(), **self._model_record(), "split": cfg.split}
        about["data"] = self.model.data_name if cfg.reference is None else str(cfg.reference)
        features = gallery.features(self.extractor)
        images = gallery.images(cfg.neighbours) if cfg.neighbours else None
        rows = self._scored(metrics, reference, features, gallery.labels(), images, about, ranks)
        if cfg.samples is not None:
            self._galleries.append(gallery)
        return rows

    def __enter__(self) -> Self:
        """A context: at its end the folders of what was made are released. Pieces stay until `kept` is called."""
        return self

    def __exit__(self, *error: Any) -> None:
        for pieces in self._pieces:
            pieces.__exit__(*error)
        self._pieces.clear()

    def _kept_until_the_end(self, pieces: Pieces) -> Pieces:
        self._pieces.append(pieces)
        return pieces

    def kept(self) -> None:
        """The rows are: write the samples that are wanted, and remove what all was made from. Not before, as what is
        interrupted goes on with those pieces."""
        while self._galleries:
            self._galleries.pop().write(Path(self.cfg.samples))
        while self._pieces:
            self._pieces.pop().remove()

    def sweep(self, ranks: Ranks, where: Place) -> Path:
        """FID over numbers of steps and kinds of noise (Song et al. 2021, DDIM, table 1), point by point: sweep.csv and
        sweep.png, which shows those asked for. Points that are there are not made again. Returns the table's path."""
        folder = self.run_folder if self.cfg.out is None and self.run_folder is not None else None
        path = (folder / "evaluations" if folder else Path(self.cfg.out or ".")) / "sweep.csv"
        self.extractor.network.to(where.device)
        reference, done, mine = self._reference(ranks), {}, []
        against = ranks.from_main(reference.digest[:12] if reference is not None else None)
        if ranks.main and path.is_file():
            done = {row["samples"]: row for row in read_sweep(path) if row.get("samples")}
        done = ranks.from_main(done)
        chosen = sweep_points(self.cfg)
        for number, cfg in enumerate(chosen, 1):
            sampling = self.gallery(cfg, ranks, where).sampling
            key = self._name(sampling) + f"_{cfg.num_images}_{self.extractor.digest[:12]}_{against}"
            mine.append(key)
            if key in done:
                continue
            if ranks.main:
                print(f"{number} of {len(chosen)}: {sampling.about['sampler']}, {len(sampling.times) - 1} steps")
            rows = self.sampled(cfg, ["fid"], reference, ranks, where)
            if not ranks.main:
                continue
            (row,) = rows
            flat = {k: v for k, v in row.items() if not isinstance(v, dict | list)} | {"fid": row["value"]}
            done[key] = flat | {"samples": key}
            write_sweep(path, list(done.values()))
            self.kept()
            print(describe(row), flush=True)
        if ranks.main:
            write_sweep(path, [done[key] for key in [*(k for k in done if k not in mine), *mine]])  # the later count
            shown = [told(done[key], self.model.config) for key in mine]
            print(sweep_table_text(shown))
            print(f"Sweep: {path}, {sweep_figure(shown, path.with_suffix('.png'))}")
        return path

    def _bits_per_dim(self, ranks: Ranks, where: Place) -> list[dict[str, Any]]:
        """The likelihood of a split of the model's data; on rank 0. The terms of a bound go to files of the run."""
        model, given = self.model, self.cfg.likelihood
        assert model is not None
        model.denoiser.network.to(where.device, memory_format=where.memory_format)
        bits = self.bits(where, ranks)
        pieces = self._measured(bits, ranks)
        numbers = bits.numbers()

        def measure(part: range) -> bool:
            pieces.write(TERMS, part, bits.measure(numbers[part.start : part.stop]))
            return True

        pieces.make(pieces.missing(TERMS), measure, "likelihood")
        with ranks.together():
            if ranks.main:
                parts = [pieces.read(TERMS, part) for part in pieces.parts(TERMS)]
                folder = self.run_folder if self.cfg.out is None else Path(self.cfg.out).parent
                for path in bits.write(parts, folder) if folder is not None else ():
                    print(f"Likelihood: {path}")
        if not ranks.main:
            return []
        mixed: dict[str, Any] = {}
        if len(sizes := pieces.batch_sizes(TERMS, given.batch_size)) > 1:
            mixed = {"batch_sizes": listed(sizes)}
            error = "rounding" if given.by == "bound" else "rounding and the solver's tolerance"
            print(f"likelihood: batch sizes {listed(sizes)} were mixed, which changes the result by {error} at most.")
        return [{**row, **mixed, "checkpoint_sha256": model.digest} for row in bits.rows(parts)]

    def _measured(self, bits: Bits, ranks: Ranks) -> Pieces:
        """Where the terms of a likelihood are kept. Which images are measured depends on their number."""
        assert self.model is not None
        count = len(bits.numbers())
        identity = [self.model.identity(), bits.identity(), self.likelihood_data.index.digest, count]
        folder, size = self._folder("likelihood_" + digest_of(identity)), self.cfg.likelihood.batch_size
        return self._kept_until_the_end(Pieces(folder, identity, ranks, count, size))

    def bits(self, where: Place, ranks: Ranks) -> Bits:
        given = self.cfg.likelihood
        chosen = {key: given[key] for key in ("by", "num_images", "batch_size", "variance", "probes", "probe")}
        settings = BitsSettings(**chosen, tolerance=given.tolerance, seed=self.cfg.seed)
        data = None if self.cfg.reference is None else str(self.cfg.reference)
        return Bits(self.model, where, self.likelihood_data, settings, ranks.attend, data)

    # ---- parts ----

    def _model_record(self) -> dict[str, Any]:
        model = self.model
        assert model is not None
        known = {"step": model.step, "weights": model.weights, "checkpoint_sha256": model.digest}
        return known | {"parameters": sum(p.numel() for p in model.denoiser.network.parameters())}

    def _reference(self, ranks: Ranks) -> Reference | None:
        if isinstance(self.real, ImageShardsDataModule):
            return build.reference(self.real, self.extractor, ranks)
        assert self.real is not None
        return reference_of(self.real, self.extractor, ranks)

    def gallery(self, cfg: DictConfig, ranks: Ranks, where: Place) -> Gallery:
        """The samples of cfg's sampler."""
        model = self.model
        assert model is not None
        sampling = build.sampling(cfg, model.denoiser, where, model.image_shape, cfg.batch_size, ranks)
        about = {**model.identity(), "step": model.step}
        if cfg.samples is not None:
            folder, setting = Path(cfg.samples) / ".batches", f"samples={cfg.samples}"
            return Gallery(folder, sampling, cfg.num_images, about, ranks, setting, cfg.overwrite)
        return Gallery(self._folder(self._name(sampling)), sampling, cfg.num_images, about, ranks)

    def _name(self, sampling: Sampling) -> str:
        return "samples_" + digest_of([self.model.identity(), sampling.identity()])

    def _folder(self, name: str) -> Path:
        """Where pieces of work are kept until they are put together."""
        key, folder = self._output()
        return folder / name if key == "out" else folder / "evaluations" / name

    def _output(self) -> tuple[str, Path]:
        """What is written goes below this folder, and which setting names it: `out` alone, where it is given."""
        cfg = self.cfg
        if cfg.out is not None:
            return "out", Path(cfg.out) if cfg.task == "sweep" else Path(cfg.out).parent
        assert self.run_folder is not None
        return "checkpoint", self.run_folder

    def rooms(self) -> list[Room]:
        """The folders that are written to, and what they need."""
        cfg, (key, folder) = self.cfg, self._output()
        if self.model is None:
            return [Room(key, folder)]
        needs, samples, what = 0, 0, []
        if self.scored:
            galleries = [self.gallery(point, Ranks(), self.place) for point in self.points()]
            needs, samples = max(gallery.needs(self.extractor) for gallery in galleries), galleries[0].written()
            what.append(f"{cfg.num_images:,} images")
        if cfg.samples is not None:
            return [Room("samples", Path(cfg.samples), needs + samples, " and ".join(what)), Room(key, folder)]
        if "bits_per_dim" in cfg.metrics and cfg.task == "score":
            bits = self.bits(self.place, Ranks())
            needs += bits.needs()
            what.append(f"the likelihood of {len(bits.numbers()):,} images")
        return [Room(key, folder, needs, " and ".join(what))]

    def check_output(self) -> None:
        """Refuse what cannot be written, before anything is made.

        Raises:
            Refusal: the run folder is read-only, and no other is named.
            Unwritable: a disk has too little room.
            ValueError: `samples` holds images of another sampling.
        """
        key, folder = self._output()
        if key == "checkpoint" and (why := obstacle(folder)):
            where = "out=FOLDER" if self.cfg.task == "sweep" else "out=FILE"
            raise Refusal(f"checkpoint={self.cfg.checkpoint}: {why}, so nothing can be kept there: give {where}.")
        if self.cfg.samples is not None and self.scored:
            self.gallery(self.cfg, Ranks(), self.place).pieces.refuse_other()
        for room in self.rooms():
            room.check()

    def points(self) -> list[DictConfig]:
        """The configuration of each sampling."""
        return sweep_points(self.cfg) if self.cfg.task == "sweep" else [self.cfg]

    def _scored(
        self,
        metrics: list[str],
        reference: Reference | None,
        features: Features,
        labels: Tensor | None,
        images: Tensor | None,
        about: dict[str, Any],
        ranks: Ranks,
    ) -> list[dict[str, Any]]:
        """Rows, and the picture of the real images nearest to `images`, if there are any."""
        cfg = self.cfg
        assert reference is not None and self.real is not None
        if isinstance(self.real, ImageFiles) and self.real.lossy:
            about = {**about, "reference_format": "jpeg"}
        rows = score(
            features, self.extractor, reference, metrics, about, self.paper,
            labels if cfg.per_class else None, ranks.working,
        )  # fmt: skip
        if self.model is not None:  # the figure of the same thing; the run's own `paper` where no table is about it
            config = self.model.config
            for row in rows:
                known = told(row, config)
                figure = counterpart(known)
                if figure is not None or places(known) or (cfg.split, cfg.reference) != ("train", None):
                    row["reference"] = None if figure is None else figure.value
        path = self._neighbours_path()
        if images is not None and path is not None:
            save_neighbours(path, images, features.pooled[: len(images)], reference, image_set(self.real))
            print(f"Nearest real images: {path}")
            rows = [{**row, "neighbours": path.name} for row in rows]
        return rows

    def _neighbours_path(self) -> Path | None:
        """Where the picture of the nearest real images goes; nowhere if the results go nowhere either."""
        if self.run_folder is not None and self.cfg.out is None:
            assert self.model is not None
            return self.run_folder / "evaluations" / f"neighbours_step_{self.model.step:08d}.png"
        return None if self.cfg.out is None else Path(self.cfg.out).parent / f"{Path(self.cfg.out).stem}_neighbours.png"


def sweep_points(cfg: DictConfig) -> list[DictConfig]:
    """The configuration with each sampler of the sweep in turn: DDIM at each eta and, with `large`, ancestral sampling
    with the large variance, the papers' sigma hat, all at each number of steps."""
    shared = {"_partial_": True, "spacing": cfg.sampler.spacing, "clip_x0": cfg.sampler.clip_x0}
    ddim = {"_target_": "diffusion.samplers.ddim.DDIM"}
    kinds = [{**ddim, "eta": float(eta)} for eta in cfg.sweep.eta]
    if cfg.sweep.large:
        kinds.append({"_target_": "diffusion.samplers.ancestral.Ancestral", "variance": "large"})
    plain = OmegaConf.to_container(cfg)
    samplers = [shared | kind | {"num_steps": int(steps)} for kind in kinds for steps in cfg.sweep.num_steps]
    return [OmegaConf.create({**plain, "sampler": sampler, "neighbours": 0, "samples": None}) for sampler in samplers]


def digest_of(identity: Any) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def image_set(given: Given) -> ImageSet:
    return given.samples if isinstance(given, ImageShardsDataModule) else given


def labelled(given: Given) -> bool:
    return given.labelled if isinstance(given, ImageFiles) else bool(given.num_classes)


def image_size(given: Given) -> tuple[int, int]:
    """(height, width)."""
    return given.image_size if isinstance(given, ImageFiles) else (given.image_size, given.image_size)
