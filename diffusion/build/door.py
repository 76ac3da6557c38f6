"""The one door for models from files: from a checkpoint, which may come from anybody, to a model and its data.

    model = trained("runs/digits")              a model, on the CPU
    module = data_of(model, root, split)        the data set that it was trained on, for reading

What a checkpoint says of itself is a Recorded, from which nothing else can be built. Here classes are made from it:
those of this package and of modules that the user trusts, each of the kind that its group takes (`build.trusted`). No
text of a checkpoint is interpolated, executed or written to. Its data set is only read: a folder with an index, or what
the user has named. The shapes of its weights are compared with its settings before any memory is taken for them.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.build.trusted import KINDS, annotations, component, nested, targets
from diffusion.data.mixture import MixtureDataModule
from diffusion.data.module import Described, ImageShardsDataModule
from diffusion.data.shards.index import INDEX_NAME
from diffusion.data.shards.remote import SCHEMES
from diffusion.denoiser import NetworkDenoiser
from diffusion.errors import Refusal
from diffusion.models.network import lacking
from diffusion.models.resolutions import resolutions
from diffusion.notices import say
from diffusion.progress import counted
from diffusion.runs.folder import RunFolder
from diffusion.runs.recorded import Recorded
from diffusion.scoring.trained import Trained
from diffusion.training.checkpoint import load
from diffusion.training.ema import key_of, load_average

MOST = {  # beyond every network and schedule; without limits settings of a few bytes would take all memory or time
    "model.image_size": 8192, "model.width": 65_536, "schedule.num_timesteps": 1_000_000, "data.num_points": 1 << 24,
}  # fmt: skip


def checkpoint_path(given: str) -> Path:
    """`checkpoint=`: a .ckpt, or a run folder, of which the newest sound checkpoint is taken."""
    path = Path(given)
    if path.is_dir():
        folder = RunFolder(path)
        _, found, complaints = folder.latest_valid()
        for complaint in complaints:
            say(complaint)
        if found is None:
            detail = " ".join(complaints) or f"{folder.checkpoints} has none."
            raise Refusal(f"checkpoint={given} has no usable checkpoint. {detail}")
        return found
    if not path.is_file():
        raise Refusal(f"checkpoint={given} does not exist. Give a run folder or a .ckpt file.")
    return path


def trained(given: str, ema: bool | float = True, trust: Sequence[str] = ()) -> Trained:
    """The model of a checkpoint, on the CPU, in evaluation mode.

    Args:
        given: a run folder or a .ckpt.
        ema: True: the averaged weights; False: the raw ones; a number: those of an average by its decay, that of
            ema.decay or a further one.
        trust: modules outside this package that the checkpoint may name, as ["mine"].

    Raises:
        ValueError: no checkpoint can be used, or it asks for something that may not be built.
    """
    path = checkpoint_path(given)
    found = load(path)
    network = _network(found.config, path, found.state_dict, trust)
    schedule, kind = _made(found.config, "schedule", path, trust), found.config.at("objective.prediction", "epsilon")
    try:
        denoiser = NetworkDenoiser(network, schedule, kind)
    except ValueError as error:
        raise Refusal(f"checkpoint={path}: its settings cannot be used: {error}") from error
    decay = found.config.at("ema.decay")
    main = key_of(decay) if isinstance(decay, int | float) else None
    if not isinstance(ema, bool) and key_of(ema) == main:
        ema = True
    if ema is not False:
        average = found.ema if ema is True else found.emas.get(key_of(ema))
        if average is None:
            there = ", ".join(["true", "false", *([main] if main else []), *found.emas])
            raise Refusal(f"ema={ema}: checkpoint={path} has no average of this decay. It has: {there}.")
        _check_shapes(path, "ema", {n: p for n, p in network.named_parameters()}, average)
        with torch.no_grad():
            load_average(network, average, [p.data for p in network.parameters()])
    network.eval().requires_grad_(False)
    return Trained(found.config, denoiser, found.step, path, weights_of(ema), tuple(trust))


def weights_of(ema: bool | float) -> str:
    """What the chosen weights are called in results: ema, raw, or `ema 0.999` of a further average. Two decays have two
    names; one of six digits or less has that which former versions gave it."""
    if isinstance(ema, bool):
        return "ema" if ema else "raw"
    return f"ema {ema:g}" if float(f"{ema:g}") == ema else f"ema {ema!r}"


def _network(config: Recorded, path: Path, state: Mapping[str, Tensor], trust: Sequence[str]) -> nn.Module:
    """The network that the settings describe, with these weights."""
    ours = config.at("model._target_") in targets("model")
    make = functools.partial(_made, config, "model", path, trust, **_arguments(config, path, state, ours))
    with torch.random.fork_rng(devices=[]):  # its initial weights are drawn, and replaced
        if ours:
            network = _without_memory(make)
            _check_state(network, path, state)
            network.to_empty(device="cpu")
        else:
            try:
                looked_at = _without_memory(make)
            except Refusal:  # its code may need the values of its weights
                looked_at = None
            if looked_at is not None:
                _check_state(looked_at, path, state)
            network = make()  # with what it keeps beside its weights
            _check_network(network, config, path)
            _check_state(network, path, state)
    network.load_state_dict({name.removeprefix("network."): tensor for name, tensor in state.items()})
    return network


def _without_memory(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def _check_state(network: nn.Module, path: Path, state: Mapping[str, Tensor]) -> None:
    """Refuse a state that is another network's."""
    _check_shapes(path, "state_dict", {f"network.{n}": t for n, t in network.state_dict().items()}, state)


def _check_network(network: nn.Module, config: Recorded, path: Path) -> None:
    """Refuse a module of the user's own that is not a network, or that answers for other images than it was asked."""
    if missing := lacking(network):
        raise Refusal(
            f"checkpoint={path}: model._target_={config.at('model._target_')} is not a network: it has no "
            f"{', no '.join(missing)}. diffusion/models/network.py says what a network must offer."
        )


def _arguments(config: Recorded, path: Path, state: Mapping[str, Tensor], ours: bool) -> dict[str, Any]:
    """The arguments of the network that follow from other settings; of ours, once these can be of such weights."""
    settings, channels = config.group("model"), config.at("model.channels")
    learned = config.at("objective.variance") == "learned"
    found: dict[str, Any] = {"out_channels": channels * (1 + learned)} if isinstance(channels, int) else {}
    if not ours:
        return found
    for key in ("blocks", "blocks_per_level"):  # each block has weights of its own
        if isinstance(settings.at(key), int) and settings.at(key) > len(state):
            raise Refusal(f"checkpoint={path}: model.{key}={settings.at(key)}, but it holds {len(state)} weights.")
    levels, each = settings.at("multipliers"), settings.at("blocks_per_level")
    if isinstance(levels, list) and len(levels) * (each if isinstance(each, int) else 1) > len(state):
        raise Refusal(f"checkpoint={path}: model.multipliers asks for more blocks than there are weights.")
    size, asked = settings.at("image_size"), settings.at("attention_resolutions")
    if isinstance(size, int) and isinstance(levels, list) and isinstance(asked, list):
        there = resolutions(size, len(levels))  # former versions let it be asked for at sizes that never occur
        found["attention_resolutions"] = [resolution for resolution in there if resolution in asked]
    return found


def _check_shapes(path: Path, what: str, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Refuse weights other than those of the network."""
    for name in sorted(wanted.keys() | found.keys()):
        shapes = [tuple(tensors[name].shape) if name in tensors else "absent" for tensors in (wanted, found)]
        if shapes[0] != shapes[1]:
            raise Refusal(
                f"checkpoint={path} holds another network than its configuration describes: {what} {name} is "
                f"{shapes[1]}, expected {shapes[0]}."
            )


def _made(config: Recorded, group: str, path: Path, trust: Sequence[str], **arguments: Any) -> Any:
    """What the class or function that a group names makes of the group's values; ours takes plain values alone."""
    target, where = config.at(f"{group}._target_"), f"checkpoint={path}"
    made = component(target, group, trust, where)
    values = {key: value for key, value in config.group(group).items() if not key.startswith("_")}
    for key, value in values.items():
        limit = MOST.get(f"{group}.{key}")
        if target not in targets(group):
            values[key] = nested(value, f"{group}.{key}", annotations(made).get(key, Any), trust, where)
        elif isinstance(value, Recorded) or (isinstance(value, list) and any(map(_no_scalar, value))):
            raise Refusal(f"checkpoint={path}: {group}.{key} is a group of settings, where a plain value belongs.")
        if limit is not None and not (type(value) is int and 1 <= value <= limit):
            raise Refusal(f"checkpoint={path}: {group}.{key}={value}, expected an integer from 1 to {limit:,}.")
    try:
        found = made(**values | arguments)
    except Exception as error:  # values of any kind, in code that expects those of conf/
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise Refusal(f"{where}: its {group} settings cannot be used: {first}") from error
    if not isinstance(found, KINDS[group][0]):
        raise Refusal(f"{where}: {group}._target_={target} has made {type(found).__name__}, not {KINDS[group][1]}.")
    return found


def _no_scalar(value: Any) -> bool:
    return not (value is None or isinstance(value, bool | int | float | str))


# ---- its data ----


def data_of(model: Trained, root: str | None = None, split: str | None = None) -> ImageShardsDataModule:
    """The data set that a model was trained on, for reading; nothing is made, fetched or written.

    Args:
        root: where the user says that it is, of any kind that `data.root` may be; None: where the checkpoint says, if
            that is a folder of this machine. split: None: the one it was trained on.

    Raises:
        ValueError: the data set does not exist or is a different one, or the checkpoint names a command or an address.
    """
    config, path = model.record, model.path
    kind = component(config.at("data._target_"), "data", model.trust, f"checkpoint={path}")
    if model.facts.points:
        return _points(model)
    if kind.drawn:
        return _in_memory(model, kind, split)
    kind = kind if kind.prepare_data is ImageShardsDataModule.prepare_data else ImageShardsDataModule
    where = config.at("data.root") if root is None else root
    if root is None:
        _refuse_elsewhere(model, where)
    skip = {"on_bad_sample": "skip"} if config.at("data.on_bad_sample") == "skip" else {}
    share = config.at("data.max_bad_share")
    if skip and isinstance(share, int | float):
        skip |= {"max_bad_share": min(max(float(share), 0.0), 1.0)}
    made = kind(
        where,
        batch_size=1,
        split=split or config.at("data.split") or "train",
        digest=config.at("data.digest"),
        **skip,
    )
    made.kept_beside = root is not None
    wanted = model.image_shape[1], model.image_shape[0]
    if (found := (made.index.image_size, made.index.channels)) != wanted:
        raise Refusal(
            f"data.root={where} holds images of {_size(*found)}, the model of checkpoint={path} was trained on images "
            f"of {_size(*wanted)}. Give another data.root."
        )
    for classes in {config.at("data.num_classes") or 0, model.num_classes} - {0, made.index.classes}:
        raise Refusal(
            f"data.root={where} has {made.index.classes} classes, the model of checkpoint={path} was trained on "
            f"{classes}: give another data.root."
        )
    return made


def _size(side: int, channels: int) -> str:
    return f"{side}x{side} pixels and {counted(channels, 'channel', 'channels')}"


def _refuse_elsewhere(model: Trained, root: str | None) -> None:
    """Refuse a root that a checkpoint may not have opened, and one that holds no data set."""
    path = model.path
    if root is None:
        raise Refusal(f"checkpoint={path} does not say where its data are: give data.root=FOLDER.")
    if root.startswith(SCHEMES):
        does = "names a command as the source of its data" if root.startswith("pipe:") else "has its data elsewhere"
        raise Refusal(
            f"checkpoint={path} {does}: {root}. Nothing is run or fetched because a checkpoint says so. If you trust "
            f"it, give data.root='{root}'."
        )
    try:
        there = (Path(root) / INDEX_NAME).is_file()
    except (OSError, ValueError):  # no name that a file could have
        there, root = False, f"{root[:60]}..."
    if not there:
        raise Refusal(
            f"checkpoint={path} was trained on data.root={root}, which is not a data set on this machine. Give "
            f"data.root=FOLDER, the folder of {model.data_name}; python -m diffusion.prepare makes it."
        )


def _in_memory(model: Trained, kind: type[ImageShardsDataModule], split: str | None) -> ImageShardsDataModule:
    """A data set of the user's own that is in no folder, of a trusted class."""
    config, where = model.record, f"checkpoint={model.path}"
    parameters = inspect.signature(kind).parameters
    others = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    names = set(parameters) | ({"batch_size", "split", "lanes", "flip", "digest", "seed"} if others else set())
    described = {field.name for field in fields(Described)} - set(parameters)
    names |= {key for key in config.group("data") if others and not key.startswith("_")} - described
    values = {key: value for key, value in config.group("data").items() if key in names}
    values |= {"batch_size": 1, "split": split or config.at("data.split") or "train", "lanes": None}
    made = {k: nested(v, f"data.{k}", annotations(kind).get(k, Any), model.trust, where) for k, v in values.items()}
    try:
        found = kind(**{name: value for name, value in made.items() if name in names})
        shape = found.channels, found.image_size, found.image_size
    except Exception as error:  # whatever the user's code raises
        raise Refusal(f"{where}: its data settings cannot be used: {type(error).__name__}: {error}") from error
    if model.image_shape != shape:
        raise Refusal(
            f"{where}: {kind.__name__} has images of {_size(shape[1], shape[0])}, the model was trained on images of "
            f"{_size(model.image_shape[1], model.image_shape[0])}."
        )
    return found


def _points(model: Trained) -> MixtureDataModule:
    """The mixture, which is drawn and not read."""
    given = model.record.group("data")
    number = given.at("num_points") or 0
    if not 1 <= number <= MOST["data.num_points"]:
        raise Refusal(f"checkpoint={model.path}: data.num_points={number}, expected up to {MOST['data.num_points']:,}.")
    made = MixtureDataModule(given.at("toy") or "", number, batch_size=1, digest=given.at("digest"))
    if model.image_shape != (shape := (made.channels, made.image_size, made.image_size)):
        raise Refusal(
            f"checkpoint={model.path}: the points of data.toy={made.toy} are {shape}, its network takes "
            f"{model.image_shape} (channels, height, width)."
        )
    return made
