"""The extractor of scores, and where what it sees in real images is kept."""

import contextlib
import hashlib
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from hydra.utils import get_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from diffusion.data.digits import DigitsDataModule, HeldOutDigitsDataModule
from diffusion.data.module import ImageShardsDataModule
from diffusion.data.shards.index import read_index
from diffusion.data.shards.remote import is_remote
from diffusion.distributed.ranks import Ranks
from diffusion.errors import Refusal
from diffusion.files import Unwritable, cache_folder, reason, sha256_of, size_of, write_atomically
from diffusion.metrics.extractors import Extractor, inception, verified
from diffusion.metrics.reference import Reference
from diffusion.metrics.takes import DIGITS, Takes
from diffusion.models.digit_classifier import DigitClassifier, train_digit_classifier
from diffusion.scoring.scores import reference_of
from diffusion.settings import Count, Matching, settings

CLASSIFIER = "classifier.safetensors"


@settings("extractor")
@dataclass(frozen=True)
class Choice:
    """Which extractor scores are from.

    Args:
        name: "inception", "digits", or of one's own. target: package.module.function that makes the latter, called
            with the path of its weights if there is one.
        weights: None: in their place. sha256: of the weights, checked before they are read.
        channels, image_size: of the images that one's own takes; None: any size.
    """

    name: Annotated[str, Matching("[A-Za-z0-9]+", "word of letters and digits")]
    weights: str | None = None
    sha256: str | None = None
    target: str | None = None
    channels: Literal[1, 3] = 3
    image_size: Count | None = None


def extractor(
    chosen: Choice, module: ImageShardsDataModule | None = None, beside: str | Path | None = None
) -> Extractor:
    """The extractor by name, on the CPU. The digits' one lies beside its data set, where it is trained if it is not
    there yet; one that is neither it nor Inception is the torch module that `extractor.target` makes."""
    if chosen.name == "inception":
        return inception(chosen.weights, chosen.sha256)
    if chosen.name == "digits":
        if chosen.weights is not None:
            return digit_extractor([Path(chosen.weights)], chosen.sha256, module)
        return digit_extractor(classifier_places(module, beside or "data/digits"), chosen.sha256, module)
    return custom_extractor(chosen)


def custom_extractor(chosen: Choice) -> Extractor:
    """The module of extractor.target, called with the path of its weights if there is one."""
    digest = None
    if chosen.weights is not None:
        if not Path(chosen.weights).is_file():
            raise Refusal(f"extractor.weights={chosen.weights}: file not found.")
        digest = verified(Path(chosen.weights), chosen.sha256)
    try:
        made = get_object(chosen.target)(*(() if chosen.weights is None else (chosen.weights,)))
    except Exception as error:  # the user's own code may raise anything
        raise Refusal(f"extractor.target={chosen.target}: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(made, nn.Module) or next(made.parameters(), None) is None:
        raise Refusal(
            f"extractor.target={chosen.target} gives {type(made).__name__}, expected a torch module with weights."
        )
    if digest is None:
        digest = hashlib.sha256(save({k: v.contiguous() for k, v in made.state_dict().items()})).hexdigest()
    # Other code makes other features of the same weights: that of the module, and of the function that makes it.
    known = [chosen.target, digest, *map(code_of, (type(made), get_object(chosen.target)))]
    digest = hashlib.sha256(json.dumps(known).encode()).hexdigest()
    return Extractor(chosen.name, made, Takes(chosen.channels, chosen.image_size), digest)


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
    elif root is not None and not is_remote(root):
        with contextlib.suppress(ValueError):  # the folder has no data set that can be read
            index = read_index(root)
    places = [Path(root) / CLASSIFIER] if root is not None and not is_remote(root) else []
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
        images, labels, *_ = module.samples_of("train").batch(np.arange(module.index.count("train")))
        images = images.clone(memory_format=torch.contiguous_format)  # another layout would make other weights
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
    return Extractor("digits", classifier, DIGITS, digest)


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


def prepare_digits(root: Path, name: str = "digits") -> tuple[Extractor, ImageShardsDataModule]:
    """The shards of the digits, of the set of this name, and beside them their classifier; existing files are kept."""
    module = (HeldOutDigitsDataModule if name == "digits_held_out" else DigitsDataModule)(root, batch_size=1)
    return digit_extractor([root / CLASSIFIER], None, module), module


def reference(module: ImageShardsDataModule, extractor: Extractor, ranks: Ranks) -> Reference | None:
    """What images are scored against, from a split of shards, kept beside them (of a remote set in its folder on this
    machine) or, where that cannot or may not be written to, in the cache folder."""
    about = {"data": module.index.content, "split": module.split, "image_size": module.image_size}
    keep, read_only = reference_folders(module)
    return reference_of(module.samples, extractor, ranks, about, keep, read_only)


def reference_folders(module: ImageShardsDataModule) -> tuple[list[Path], list[Path]]:
    """Where the features of a set's images may be kept, the first choice first; and where else they may be found."""
    cache = cache_folder() / "references"
    if module.root is None:
        return [cache], []
    beside = Path(module.remote.folder).expanduser() / "references" if is_remote(module.root) else Path(module.root)
    return ([beside, cache], []) if module.kept_beside else ([cache], [beside])
