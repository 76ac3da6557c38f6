"""Which settings have no effect beside others, and why; without torch or lightning.

    refuse_idle(cfg, typed)

A setting that a user has typed and that nothing reads would be taken for one that has been at work, and recorded as
such. What conf/ says by itself is never refused, nor a typed value that would hold anyway. Whether a value is allowed
is not known here (see check.py), nor what is in a checkpoint or in a data set that is elsewhere.

In a sweep a setting may have an effect in some jobs alone: a job is composed of those words that have one in it, and
`refuse_idle_words` refuses what has none in any job.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from diffusion.config.compose import Typed, composed, flattened
from diffusion.config.declared import attributes
from diffusion.config.words import parse, plain, shown, typeable
from diffusion.data.digit_sets import SPLITS as DIGITS
from diffusion.data.shards.index import INDEX_NAME, held_out_from, read_index
from diffusion.data.shards.remote import is_remote
from diffusion.errors import Refusal


class Idle(NamedTuple):
    """Settings that have no effect under a condition.

    commands: names of conf/*.yaml. keys: of settings and of groups of options, in words; `a.*` is all below a.
    when: the condition, of a composed configuration. why: what holds then, `{key}` being the value of a key.
    cure: what gives the setting an effect, `{word}` being what was typed; None: nothing does.
    """

    commands: str
    keys: str
    when: Callable[[DictConfig], bool]
    why: str
    cure: str | None = None


def unguided(cfg: DictConfig) -> bool:
    return "_target_" not in cfg.guidance


def swept(cfg: DictConfig) -> bool:
    return cfg.get("task") == "sweep"


def all_visited(cfg: DictConfig) -> bool:
    """Whether a sampler visits every level of its schedule, of which there is one order only."""
    steps, levels = cfg.sampler.get("num_steps"), OmegaConf.select(cfg, "schedule.num_timesteps")
    levels = levels if cfg.get("checkpoint") is None else None  # a checkpoint has levels of its own
    spacing = cfg.sampler.get("spacing")
    if swept(cfg) or not isinstance(spacing, str) or cfg.sampler.get("max_calls") is not None:
        return False
    return steps is None or steps == levels and spacing in ("linear", "trailing")


def data_set(path: str | None) -> bool:
    """Whether a path is one of shards, which have splits."""
    return path is not None and (is_remote(path) or (Path(path) / INDEX_NAME).is_file())


def drawn(cfg: DictConfig) -> bool:
    """Whether the data are in no folder: the class of `data` says so."""
    return bool(attributes(str(cfg.data.get("_target_"))).get("drawn"))


def held_out_anywhere(cfg: DictConfig) -> bool:
    """Whether the loss is measured on a split that nobody has chosen."""
    return bool(cfg.held_out.every_steps) and cfg.held_out.split is None


def never_held_out(cfg: DictConfig) -> bool:
    """Whether the data, if they are on this machine, have no split for it."""
    splits = splits_here(cfg)
    return held_out_anywhere(cfg) and bool(splits) and held_out_from(splits, cfg.data.get("split", "train")) is None


def splits_here(cfg: DictConfig) -> tuple[str, ...]:
    """The splits of data that are drawn, on this machine, or made on it; () where they are not known."""
    root, known = cfg.data.root, DIGITS.get(cfg.data.name, ())
    if drawn(cfg):
        known = tuple(attributes(str(cfg.data["_target_"])).get("splits", ()))
    if root is None or is_remote(root) or not data_set(root):
        return known
    try:
        found = read_index(root).splits
    except (ValueError, OSError):  # a damaged set, which is named elsewhere, as is another set than that of the name
        return ()
    return found if set(known) <= set(found) else ()


def of_images(cfg: DictConfig) -> bool:
    return cfg.checkpoint is None and cfg.images is not None


def likelihood_alone(cfg: DictConfig) -> bool:
    return cfg.task == "score" and set(cfg.metrics) == {"bits_per_dim"}


def no_likelihood(cfg: DictConfig) -> bool:
    return swept(cfg) or "bits_per_dim" not in cfg.metrics


def no_scores(cfg: DictConfig) -> bool:
    return cfg.callbacks.enabled and not cfg.metrics


def task_is_not(*names: str) -> Callable[[DictConfig], bool]:
    return lambda cfg: cfg.task not in names


def toy_of(cfg: DictConfig) -> str:
    return cfg.toy or ("gaussian" if cfg.task == "errors" else "modes")


ANY = "train sample evaluate lab"  # that sample
MEASURED = "held_out.every_steps held_out.num_images held_out.batch_size"
OF_SAMPLER = (  # alone, wherever it is chosen
    Idle(ANY, "sampler.rho", lambda cfg: cfg.sampler.get("spacing") != "karras",
         "sampler.spacing={sampler.spacing}", "sampler.spacing=karras {word}"),
    Idle(ANY, "sampler.corrector.*", lambda cfg: cfg.sampler.get("visits") == 1,
         "with sampler.visits=1 every step is the predictor's", "sampler.visits=2"),
)  # fmt: skip
TABLE = (
    # ---- sampling ----
    Idle(ANY, "guidance.scale", unguided, "guidance=none", "guidance=classifier_free {word}"),
    *OF_SAMPLER,
    Idle(ANY, "sampler.spacing sampler.rho", all_visited,
         "every level is visited (sampler.num_steps={sampler.num_steps})",
         "sampler.num_steps=N below the number of levels"),
    Idle(ANY, "sampler.num_steps", lambda cfg: cfg.sampler.get("max_calls") is not None,
         "sampler.max_calls={sampler.max_calls} decides the number of steps", "sampler.max_calls=null {word}"),
    Idle(ANY, "sampler.num_steps sampler.max_calls", lambda cfg: not isinstance(cfg.sampler.get("spacing", ""), str),
         "sampler.spacing={sampler.spacing} gives the times themselves", "sampler.spacing=linear {word}"),
    # ---- training ----
    Idle("train", "metrics extractor.* callbacks.grid.* callbacks.score.*",
         lambda cfg: not cfg.callbacks.enabled, "callbacks=none samples and scores nothing", "callbacks=default"),
    Idle("train", "extractor extractor.* callbacks.score.*", no_scores, "metrics=[] scores nothing", "metrics=[fid]"),
    Idle("train", "callbacks.score.during.*",
         lambda cfg: cfg.callbacks.enabled and not cfg.callbacks.score.every_steps,
         "callbacks.score.every_steps=0 scores at the end alone", "callbacks.score.every_steps=N"),
    Idle("train", "model.fourier_scale", lambda cfg: cfg.model.get("time_embedding") == "positional",
         "model.time_embedding=positional", "model.time_embedding=fourier {word}"),
    Idle("train", "levels.gamma", lambda cfg: cfg.levels.get("weight") == "one",
         "levels.weight=one", "levels.weight=min_snr {word}"),
    Idle("train", "data.remote.*",
         lambda cfg: not is_remote(cfg.data.root), "data.root={data.root} is a folder of this machine"),
    Idle("train", "data.max_bad_share", lambda cfg: cfg.data.get("on_bad_sample") == "error",
         "data.on_bad_sample=error stops at the first one", "data.on_bad_sample=skip {word}"),
    Idle("train", "data.rule data.rule.*", lambda cfg: True,
         "it is how diffusion.prepare makes the set, which training takes as it is"),
    Idle("train", "data.root", drawn, "the points are drawn, nothing is on disk"),
    Idle("train", "max_nonfinite", lambda cfg: cfg.on_nonfinite == "stop",
         "on_nonfinite=stop stops at the first one", "on_nonfinite=skip {word}"),
    Idle("train", "held_out.split held_out.num_images held_out.batch_size",
         lambda cfg: cfg.held_out.every_steps == 0, "held_out.every_steps=0 measures nothing",
         "held_out.every_steps=1000 {word}"),
    Idle("train", MEASURED, never_held_out, "data={data.name} has no split validation or test that is not trained on"),
    # ---- evaluate ----
    Idle("evaluate", "data.root", lambda cfg: of_images(cfg) or data_set(cfg.reference),
         "it is where a checkpoint's own data are, which are not read here"),
    Idle("evaluate", "num_images sampler sampler.* guidance guidance.* ema batch_size seed", of_images,
         "with images={images} nothing is sampled", "checkpoint=PATH in the place of images"),
    Idle("evaluate", "num_images sampler sampler.* guidance guidance.* batch_size neighbours split extractor "
         "extractor.* samples", likelihood_alone,
         "metrics=[bits_per_dim] samples nothing and scores no samples", "metrics=[fid,bits_per_dim]"),
    Idle("evaluate", "likelihood.*", swept, "task=sweep measures FID", "task=score metrics=[bits_per_dim]"),
    Idle("evaluate", "likelihood.*", no_likelihood, "metrics={metrics}", "metrics=[bits_per_dim]"),
    Idle("evaluate", "likelihood.probes likelihood.probe likelihood.start likelihood.tolerance",
         lambda cfg: cfg.likelihood.by == "bound", "likelihood.by=bound", "likelihood.by=ode {word}"),
    Idle("evaluate", "likelihood.probe", lambda cfg: cfg.likelihood.probes == 0,
         "likelihood.probes=0 computes the exact trace", "likelihood.probes=1"),
    Idle("evaluate", "likelihood.variance", lambda cfg: cfg.likelihood.by == "ode",
         "likelihood.by=ode has no reverse steps", "likelihood.by=bound {word}"),
    Idle("evaluate", "images_split", lambda cfg: cfg.images is None, "images=PATH is not given"),
    Idle("evaluate", "images_split", lambda cfg: not data_set(cfg.images),
         "images={images} is not a data set of shards"),
    Idle("evaluate", "split", lambda cfg: cfg.reference is not None and not data_set(cfg.reference),
         "reference={reference} is not a data set of shards"),
    Idle("evaluate", "sweep sweep.*", lambda cfg: not swept(cfg), "task={task}", "task=sweep {word}"),
    Idle("evaluate", "sampler sampler._* sampler.eta sampler.num_steps sampler.max_calls "
         "sampler.variance sampler.visits sampler.start sampler.step_size sampler.convention sampler.denoise "
         "sampler.predictor.* sampler.corrector.*", swept,
         "task=sweep has samplers of its own: sweep.num_steps, sweep.eta, sweep.large", "task=score {word}"),
    Idle("evaluate", "neighbours per_class", swept, "task=sweep measures FID alone", "task=score {word}"),
    Idle("evaluate", "metrics", lambda cfg: swept(cfg) and list(cfg.metrics) != ["fid"],
         "task=sweep measures FID alone", "task=score {word}"),
    # ---- lab ----
    Idle("lab", "equivalence equivalence.*", task_is_not("equivalence"), "task={task}", "task=equivalence"),
    Idle("lab", "forward forward.*", task_is_not("forward"), "task={task}", "task=forward"),
    Idle("lab", "reverse reverse.*", task_is_not("reverse"), "task={task}", "task=reverse"),
    Idle("lab", "modes modes.*", task_is_not("modes"), "task={task}", "task=modes"),
    Idle("lab", "errors errors.*", task_is_not("errors"), "task={task}", "task=errors"),
    Idle("lab", "sampler sampler.* guidance guidance.* batch_size", task_is_not("errors"),
         "task={task} does not use it", "task=errors"),
    Idle("lab", "samplers", task_is_not("errors", "reverse", "modes"), "task={task} compares no samplers",
         "task=errors, reverse or modes"),
    Idle("lab", "schedule schedule.*", lambda cfg: cfg.checkpoint is not None,
         "with checkpoint={checkpoint} the noise levels are those the model was trained on"),
    Idle("lab", "data.root", lambda cfg: cfg.checkpoint is None, "checkpoint=PATH is not given"),
    Idle("lab", "ema batch_size sampler.clip_x0 errors.num_images errors.split", lambda cfg: cfg.checkpoint is None,
         "checkpoint=PATH is not given", "checkpoint=PATH"),
    Idle("lab", "gaussian gaussian.*", lambda cfg: cfg.checkpoint is not None,
         "with checkpoint={checkpoint} the data are the model's own"),
    Idle("lab", "gaussian.fitted_on", task_is_not("errors"), "task={task} measures no denoiser", "task=errors {word}"),
    Idle("lab", "gaussian.mean gaussian.stds", lambda cfg: toy_of(cfg) != "gaussian",
         "the data are another toy", "toy=gaussian {word}"),
    Idle("lab", "errors.num_points errors.times", lambda cfg: cfg.checkpoint is None and toy_of(cfg) == "gaussian",
         "of Gaussian data the errors are computed exactly, without points", "toy=modes {word}"),
    # ---- report, prepare, benchmark ----
    Idle("report", "runs out", lambda cfg: cfg.run_dir is not None, "run_dir={run_dir} is given",
         "runs=FOLDER in the place of run_dir"),
    Idle("report prepare benchmark", "seed", lambda cfg: True, "nothing is drawn by this seed"),
    Idle("prepare", "source image_size channels crop resize background labels_from validation format quality "
         "shard_samples on_bad_sample max_bad_share max_pixels", task_is_not("make"),
         "task=verify looks at a set that is made", "task=make"),
    Idle("prepare", "image_size channels crop resize background labels_from validation format quality shard_samples "
         "on_bad_sample max_bad_share max_pixels processes", lambda cfg: cfg.source == "digits",
         "source=digits is made as conf/data/digits.yaml says"),
    Idle("prepare", "max_bad_share", lambda cfg: cfg.on_bad_sample == "error",
         "on_bad_sample=error stops at the first one", "on_bad_sample=skip {word}"),
    Idle("prepare", "crop resize", lambda cfg: cfg.image_size is None and cfg.dataset is None
         and {cfg.crop, cfg.resize} - {None, "none"} != set(),
         "without image_size all images must have one size, and are kept as they are", "image_size=PIXELS {word}"),
    Idle("benchmark", "gpu_check gpu_check.*", task_is_not("gpu_check"), "task={task}", "task=gpu_check"),
    Idle("benchmark", "loader loader.*", task_is_not("loader"), "task={task}", "task=loader"),
    Idle("benchmark", "overhead overhead.*", task_is_not("overhead"), "task={task}", "task=overhead"),
    Idle("benchmark", "digests digests.*", task_is_not("digests"), "task={task}", "task=digests"),
    Idle("benchmark", "loader.image_size", lambda cfg: cfg.loader.root is not None,
         "the images of loader.root={loader.root} have their own size"),
)  # fmt: skip

NONE_HELD_OUT = (  # of a data set elsewhere, which has to be looked at
    Idle("train", MEASURED, held_out_anywhere,
         "the set in data.root={data.root} has no split validation or test beside the one that is trained on"),
)  # fmt: skip
OF_POINTS = (  # of a checkpoint, which has to be looked at: a model of points, or one of images
    Idle("lab", "guidance guidance.* sampler.clip_x0 batch_size errors.num_images errors.split data.root",
         lambda cfg: True, "checkpoint={checkpoint} is a model of points"),
)  # fmt: skip
OF_IMAGES = (
    Idle("lab", "samplers errors.num_steps", lambda cfg: True, "checkpoint={checkpoint} is a model of images"),
    Idle("lab", "errors.num_points", lambda cfg: True, "checkpoint={checkpoint} is a model of images",
         "errors.num_images=N"),
)  # fmt: skip


def refuse_idle(cfg: DictConfig, typed: Typed, table: Sequence[Idle] = TABLE) -> None:
    """Refuse what a user has typed that has no effect. Raises Refusal."""
    for message in idle_words(cfg, typed, table).values():
        raise Refusal(message)


def idle_words(cfg: DictConfig, typed: Typed, table: Sequence[Idle] = TABLE) -> dict[str, str]:
    """A message for each setting, and each group whose option was chosen, that a user has typed without effect."""
    found: dict[str, str] = {}
    for idle in table:
        if typed.command not in idle.commands.split():
            continue
        patterns = idle.keys.split()
        settings = {k: word for k, word in typed.settings.items() if matches(k, patterns)}
        options = {g: option for g, option in typed.options.items() if g in patterns}
        if not (settings or options) or not idle.when(cfg):
            continue
        words = {key: word for key, word in settings.items() if differs(cfg, key, typed)}
        words |= {g: f"{g}={option}" for g, option in options.items() if option != typed.default_options.get(g)}
        for key, word in words.items():
            found.setdefault(key, sentence(idle, cfg, word))
    return found


def matches(key: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def differs(cfg: DictConfig, key: str, typed: Typed) -> bool:
    """Whether a typed value is another than would hold anyway."""
    default = OmegaConf.select(typed.defaults, key, throw_on_missing=False)
    return OmegaConf.select(cfg, key, throw_on_missing=False) != default


def sentence(idle: Idle, cfg: DictConfig, word: str) -> str:
    """guidance.scale=4.0 has no effect: guidance=none. Give guidance=classifier_free guidance.scale=4.0."""
    why = idle.why
    for key in {part.partition("}")[0] for part in why.split("{")[1:]}:
        why = why.replace("{" + key + "}", shown(OmegaConf.select(cfg, key)))
    cure = "Leave it out." if idle.cure is None else f"Give {idle.cure.replace('{word}', word)}, or leave it out."
    return f"{word} has no effect: {why}. {cure}"


# ---- the jobs of a sweep ----


class Job(NamedTuple):
    """One job of a sweep: the words that have an effect in it, and the configuration that they make, to be read; idle:
    a message for each setting that has none."""

    words: tuple[str, ...]
    cfg: DictConfig
    idle: Mapping[str, str]


@functools.cache
def job_of(command: str, words: tuple[str, ...]) -> Job:
    """The job that these words of a command make. Raises Refusal where they cannot be composed."""
    idle: dict[str, str] = {}
    while found := idle_words(cfg := composed(command, list(words)), Typed(command, words)):
        idle |= found
        words = tuple(without(words, found))
    return Job(words, cfg, idle)


def without(words: Iterable[str], keys: Iterable[str]) -> list[str]:
    """The words that are left when these settings and groups are left out."""
    left, keys = [], set(keys)
    for word in words:
        override = parse(word)
        key, value = override.key_or_group, None if override.is_sweep_override() else plain(override.value())
        inner = flattened(key, value) if isinstance(value, dict) else {}
        if keys & inner.keys():
            left += [f"{name}={typeable(one)}" for name, one in inner.items() if name not in keys]
        elif key not in keys:
            left.append(word)
    return left


def refuse_idle_words(command: str, jobs: Iterable[Sequence[str]]) -> None:
    """Refuse a word of a sweep that has no effect in any of its jobs. Raises Refusal."""
    idle, at_work = {}, set()
    for words in jobs:
        job = job_of(command, tuple(words))
        for key, word in Typed(command, tuple(words)).all.items():
            if key in job.idle:
                idle.setdefault((key, word), job.idle[key])
            else:
                at_work.add((key, word))
    for word, message in idle.items():
        if word not in at_work:
            raise Refusal(message)


def typed() -> Typed:
    """The words of the command that runs in this process; of a sweep, those that have an effect in this job of it."""
    if not HydraConfig.initialized():
        return Typed()
    hydra_cfg = HydraConfig.get()
    words = OmegaConf.to_container(hydra_cfg.overrides.task, resolve=False)  # which may be interpolations themselves
    command = str(hydra_cfg.job.config_name)
    return Typed(command, job_of(command, tuple(words)).words if hydra_cfg.mode == RunMode.MULTIRUN else tuple(words))
