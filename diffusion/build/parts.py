"""From a checked configuration to the objects it names: one function a config group.

The configuration is the user's own, as composed from conf/ and the command line. Models from files come in by
`app/door.py` alone.

Keys of a group that its class does not take (num_steps of a sampler, warmup_steps of an optimizer) are read here and
nowhere else.
"""

import contextlib
import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from diffusion.config.check import check_steps, check_variance, learns_variance
from diffusion.errors import Refusal
from diffusion.data.digits import DigitsDataModule
from diffusion.data.shards.index import read_index
from diffusion.data.module import ImageShardsDataModule
from diffusion.data.shards.remote import is_remote
from diffusion.denoiser import Clipped, NetworkDenoiser
from diffusion.files import Unwritable, cache_folder, reason, sha256_of, size_of, write_atomically
from diffusion.metrics.extractors import Extractor, inception, verified
from diffusion.metrics.reference import Reference
from diffusion.models.digit_classifier import DigitClassifier, train_digit_classifier
from diffusion.noise import Stream, seed63
from diffusion.objective import Objective
from diffusion.process.schedule import Denoiser, Prediction, Schedule
from diffusion.process.times import times
from diffusion.samplers.base import Sampler
from diffusion.distributed.ranks import Ranks
from diffusion.scoring.sampling import Counted, Sampling
from diffusion.scoring.scores import reference_of

CLASSIFIER = "classifier.safetensors"
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def without(cfg: DictConfig, *names: str) -> DictConfig:
    """The group without the keys that its class does not take."""
    return OmegaConf.create({k: v for k, v in cfg.items() if k not in names})


def settings(cfg: DictConfig) -> dict[str, Any]:
    """The values of a group, those of the groups in it as `corrector.snr`; what is built of it is left out."""
    found: dict[str, Any] = {}
    for name, value in cfg.items():
        if isinstance(value, DictConfig):
            found |= {f"{name}.{key}": inner for key, inner in settings(value).items()}
        elif not name.startswith("_"):
            found[name] = value
    return found


def make(cfg: DictConfig, group: str, **arguments: Any) -> Any:
    """Instantiate a group, with these arguments beside its keys; what its class refuses is answered in the user's
    words."""
    if not isinstance(cfg, DictConfig):
        raise TypeError(f"{group}: only what was composed for this command is built")
    try:
        if not cfg.get("_partial_"):
            return instantiate(cfg, _convert_="all", **arguments)
        return instantiate(cfg, _convert_="all")(**arguments)
    except InstantiationException as e:
        cause = e.__cause__ or e
        raise Refusal(f"{group}: {reason(cause).splitlines()[0]}") from e
    except TypeError as e:  # an argument that a partial's class does not have
        raise Refusal(f"{group}: {reason(e)}") from e


# ---- where it runs ----


class Place(NamedTuple):
    """Device, precision of the network, memory format."""

    device: torch.device
    precision: str
    memory_format: torch.memory_format

    def autocast(self) -> contextlib.AbstractContextManager:
        """bf16 inside the network where that was asked for."""
        if self.precision == "32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


def place(cfg: DictConfig) -> Place:
    """The `trainer` group's accelerator, precision and memory_format, `auto` decided by what is there."""
    cuda = torch.cuda.is_available()
    if cfg.accelerator == "gpu" and not cuda:
        raise Refusal("trainer.accelerator=gpu, but torch sees no CUDA device: give trainer=cpu.")
    device = torch.device("cuda" if cuda and cfg.accelerator != "cpu" else "cpu")
    auto = "bf16-mixed" if device.type == "cuda" else "32"
    precision = auto if cfg.precision == "auto" else str(cfg.precision)
    wanted = cfg.memory_format
    if wanted == "auto":
        wanted = "channels_last" if device.type == "cuda" else "contiguous"
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    return Place(device, precision, FORMATS[wanted])


# ---- the parts ----


def schedule(cfg: DictConfig) -> Schedule:
    return make(cfg.schedule, "schedule")


def network(cfg: DictConfig, seed: int = 0) -> nn.Module:
    """The network of a whole configuration, whose objective decides how many channels it answers with; its initial
    weights belong to the seed."""
    channels = cfg.model.channels * (2 if learns_variance(cfg.objective) else 1)
    state = torch.get_rng_state()
    torch.manual_seed(seed63(seed, Stream.INIT))
    try:
        return make(cfg.model, "model", out_channels=channels)
    finally:
        torch.set_rng_state(state)


def objective(cfg: DictConfig, levels: Schedule) -> Objective:
    return make(without(cfg.objective, "label_dropout"), "objective", schedule=levels)


def optimizer(cfg: DictConfig) -> Callable:
    return make_partial(without(cfg.optimizer, "warmup_steps", "gradient_clip"), "optimizer")


def make_partial(cfg: DictConfig, group: str) -> Callable:
    """The partial itself, its argument names tried out on one parameter so that a wrong one is refused now."""
    try:
        partial = instantiate(cfg, _convert_="all")
        partial([nn.Parameter(torch.zeros(1))])
    except (InstantiationException, TypeError, ValueError) as e:
        raise Refusal(f"{group}: {str(e.__cause__ or e).splitlines()[0]}") from e
    return partial


def sampler(cfg: DictConfig, levels: Schedule) -> tuple[Sampler, list[float]]:
    """The sampler and the times it visits."""
    check_steps(cfg.sampler, levels.num_timesteps)
    steps = levels.num_timesteps if cfg.sampler.num_steps is None else cfg.sampler.num_steps
    built = make(without(cfg.sampler, "num_steps", "spacing", "visits", "clip_x0"), "sampler", schedule=levels)
    return built, times(levels.num_timesteps, steps, cfg.sampler.spacing, cfg.sampler.get("visits", 1))


def sampled(cfg: DictConfig, called: Denoiser, denoiser: NetworkDenoiser, where: Place) -> Denoiser:
    """What a sampler calls: `called`, the network's denoiser, in its precision, guided and clipped as configured."""

    def denoise(x_t: Tensor, t: float | Tensor, labels: Tensor | None = None) -> Prediction:
        with where.autocast():
            return called(x_t.contiguous(memory_format=where.memory_format), t, labels)

    guided: Denoiser = denoise
    if "_target_" in cfg.guidance:
        guided = make(cfg.guidance, "guidance", denoiser=denoise, null_label=denoiser.network.null_label)
    return Clipped(guided, denoiser.schedule) if cfg.sampler.clip_x0 else guided


def data(cfg: DictConfig) -> ImageShardsDataModule:
    """The data module; what conf/ says of the set was held against its index by the checks."""
    described = without(cfg.data, "name", "image_size", "channels", "num_classes", "rule")
    return make(OmegaConf.merge(described, {"seed": cfg.seed}), "data")


# ---- extractors ----


def extractor(
    cfg: DictConfig, module: ImageShardsDataModule | None = None, beside: str | Path | None = None
) -> Extractor:
    """The extractor by name, on the CPU. The digits' one lies beside its data set, where it is trained if it is not
    there yet; one that is neither it nor Inception is the torch module that `extractor.target` makes."""
    chosen = cfg.extractor
    if chosen.name == "inception":
        return inception(chosen.weights, chosen.sha256)
    if chosen.name == "digits":
        if chosen.weights is not None:
            return digit_extractor([Path(chosen.weights)], chosen.sha256, module)
        return digit_extractor(classifier_places(module, beside or "data/digits"), chosen.sha256, module)
    return custom_extractor(chosen)


def custom_extractor(cfg: DictConfig) -> Extractor:
    """The module of extractor.target, called with the path of its weights if there is one."""
    digest = None
    if cfg.weights is not None:
        if not Path(cfg.weights).is_file():
            raise Refusal(f"extractor.weights={cfg.weights}: there is no such file.")
        digest = verified(Path(cfg.weights), cfg.sha256)
    try:
        made = get_object(cfg.target)(*(() if cfg.weights is None else (cfg.weights,)))
    except Exception as error:  # the user's own code may raise anything
        raise Refusal(f"extractor.target={cfg.target}: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(made, nn.Module) or next(made.parameters(), None) is None:
        raise Refusal(
            f"extractor.target={cfg.target} gives {type(made).__name__}, expected a torch module with weights."
        )
    if digest is None:
        digest = hashlib.sha256(save({k: v.contiguous() for k, v in made.state_dict().items()})).hexdigest()
    # Other code makes other features of the same weights: that of the module, and of the function that makes it.
    known = [cfg.target, digest, *map(code_of, (type(made), get_object(cfg.target)))]
    digest = hashlib.sha256(json.dumps(known).encode()).hexdigest()
    return Extractor(cfg.name, made, cfg.channels, cfg.image_size, digest)


def code_of(thing: Any) -> str | None:
    """sha256 of the file that a class or a function is written in; None for what has none, such as a partial."""
    try:
        file = inspect.getsourcefile(inspect.unwrap(thing))
    except TypeError:
        return None
    return sha256_of(file) if file else None


def first_line(error: Exception) -> str:
    return reason(error).splitlines()[0]


def classifier_places(module: ImageShardsDataModule | None, beside: str | Path) -> list[Path]:
    """Where the digit classifier of a data set may be: beside its shards or, where these cannot be written to, in the
    cache folder, under the digest of the set.

    Args:
        module: of the digits; None: only their folder, `beside`, is known.
    """
    index, root = None, beside
    if module is not None:
        index, root = module.index, module.root
    elif not is_remote(root):
        with contextlib.suppress(ValueError):  # the folder has no data set that can be read
            index = read_index(root)
    places = [Path(root) / CLASSIFIER] if module is None or not is_remote(root) else []
    if index is not None:
        places.append(cache_folder() / "classifiers" / f"{index.content[:16]}.safetensors")
    return places


def digit_extractor(places: Sequence[Path], sha256: str | None, module: ImageShardsDataModule | None) -> Extractor:
    """The digit classifier; trained if it is in none of the places and a module gives the digits, and stored at the
    first place that can and may be written to.

    Raises:
        Refusal: the file does not exist, and no digits are given to train it on.
        Unwritable: none of the places can be written to.
    """
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        if module is None:
            raise Refusal(
                f"extractor.weights={places[0]} does not exist. It is made with the digit shards: "
                f"python -m diffusion.prepare source=digits"
            )
        images = torch.stack([torch.from_numpy(module.samples[i][0].copy()) for i in range(module.num_images)])
        labels = torch.tensor([module.samples[i][1] for i in range(module.num_images)])
        allowed = [place for place in places if module.kept_beside or place.parent != Path(module.root)]
        path = stored_first(allowed, save(train_digit_classifier(images, labels).state_dict()))
    digest = verified(path, sha256)
    classifier = DigitClassifier()
    try:
        classifier.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:  # no such file, or one of another network
        raise Refusal(
            f"extractor.weights={path} is damaged, or not a digit classifier ({first_line(error)}). Remove it: it is "
            f"made again, the same, when it is needed."
        ) from error
    return Extractor("digits", classifier, channels=1, image_size=8, digest=digest)


def stored_first(places: Sequence[Path], content: bytes) -> Path:
    """Write to the first place that takes it; which one that is. Unwritable if none does."""
    reasons = []
    for place in places:
        try:
            write_atomically(place, content)
            return place
        except OSError as error:
            reasons.append(reason(error).rstrip("."))
    raise Unwritable(
        f"The digit classifier ({size_of(len(content))}) cannot be stored: {'; '.join(reasons)}. Give "
        f"extractor.weights=PATH, a file in a folder that can be written to, or set XDG_CACHE_HOME to such a folder."
    )


def prepare_digits(root: Path) -> tuple[Extractor, ImageShardsDataModule]:
    """The digit shards and, beside them, their classifier; existing files are kept."""
    module = DigitsDataModule(root, batch_size=1)
    return digit_extractor([root / CLASSIFIER], None, module), module


# ---- sampling ----


def with_fast_sampler(cfg: DictConfig, num_steps: int) -> DictConfig:
    """The configuration with DDIM of so many steps in the place of its sampler."""
    fast = {"_target_": "diffusion.samplers.ddim.DDIM", "_partial_": True, "eta": 0.0, "num_steps": num_steps}
    fast |= {"spacing": "linear", "clip_x0": cfg.sampler.clip_x0}
    return OmegaConf.create({**OmegaConf.to_container(cfg), "sampler": fast})


def reference(module: ImageShardsDataModule, extractor: Extractor, ranks: Ranks) -> Reference | None:
    """What images are scored against, from a split of shards, kept beside them (of a remote set in its folder on this
    machine) or, where that cannot or may not be written to, in the cache folder."""
    about = {"data": module.index.content, "split": module.split, "image_size": module.image_size}
    keep, read_only = reference_folders(module)
    return reference_of(module.samples, extractor, ranks, about, keep, read_only)


def reference_folders(module: ImageShardsDataModule) -> tuple[list[Path], list[Path]]:
    """Where the features of a set's images may be kept, the first choice first; and where else they may be found."""
    beside = Path(module.remote["folder"]).expanduser() / "references" if is_remote(module.root) else Path(module.root)
    cache = cache_folder() / "references"
    return ([beside, cache], []) if module.kept_beside else ([cache], [beside])


def sampling(
    cfg: DictConfig,
    denoiser: NetworkDenoiser,
    where: Place,
    image_shape: tuple[int, int, int],
    batch_size: int = 256,
    ranks: Ranks | None = None,
    labels: Sequence[int] = (),
) -> Sampling:
    """All that decides the images of a model but their numbers: cfg's sampler, guidance and seed. Every evaluation of
    the network is a moment at which the ranks may leave the sampling."""
    built, visited = sampler(cfg, denoiser.schedule)
    num_classes = denoiser.network.num_classes
    check_variance(cfg.sampler, learned=denoiser.network.out_channels == 2 * image_shape[0])
    for label in labels:
        if label >= max(num_classes, 1):
            raise Refusal(f"labels={labels}: this model has {num_classes} classes; {label} is none of them.")
    if labels and not num_classes:
        raise Refusal(f"labels={labels}: this model is unconditional.")
    counted = Counted(denoiser, (ranks or Ranks()).attend)
    about = {"sampler": type(built).__name__.lower(), **settings(without(cfg.sampler, "num_steps"))}
    about |= {"guidance_scale": cfg.guidance.scale, "precision": where.precision}
    return Sampling(
        sampled(cfg, counted, denoiser, where), counted, built, visited, image_shape, num_classes, cfg.seed,
        where.device, batch_size, labels, about,
    )  # fmt: skip
