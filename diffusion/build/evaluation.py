"""From the settings of `evaluate` to what is measured, and against what."""

from pathlib import Path

from omegaconf import DictConfig

from diffusion.build import door, extractors, parts
from diffusion.build.extractors import Choice
from diffusion.build.parts import Factory
from diffusion.build.sampling import chosen_sampler, recipe
from diffusion.build.take import take
from diffusion.config.check import check_guidance, check_number, check_real, refuse_times
from diffusion.config.effect import typed
from diffusion.config.metrics import known
from diffusion.data.image_files import ImageFiles
from diffusion.data.module import ImageShardsDataModule
from diffusion.data.shards.index import INDEX_NAME
from diffusion.data.shards.remote import is_remote
from diffusion.distributed.launcher import Compute
from diffusion.distributed.place import Place
from diffusion.distributed.ranks import Ranks
from diffusion.errors import Refusal
from diffusion.files import obstacle
from diffusion.metrics.extractors import Extractor
from diffusion.metrics.metric import try_out
from diffusion.metrics.reference import Reference
from diffusion.runs.folder import RunFolder
from diffusion.scoring.against import Against, Given, Output, image_set, image_size, labelled
from diffusion.scoring.bits import Settings as BitsSettings
from diffusion.scoring.comparison import Comparison
from diffusion.scoring.evaluation import Evaluation, Kept, Likelihood, Sweep
from diffusion.scoring.recipe import Plan
from diffusion.scoring.scores import reference_of
from diffusion.scoring.sweep import SweepEvaluation
from diffusion.scoring.trained import Trained


def comparison(cfg: DictConfig) -> Comparison:
    """Images of files, and the real ones.

    Raises:
        ValueError: a set cannot be read, has too few images, or the two do not go together.
    """
    choice = take(cfg.extractor, Choice)
    extractor = extractors.extractor(choice, None, beside(cfg.reference, cfg.images))
    real = given("reference", cfg.reference, cfg.split, extractor)
    images = given("images", cfg.images, cfg.images_split, extractor)
    check_number(cfg.metrics, len(image_set(images)), f"images={cfg.images}")
    against = against_of(cfg, extractor, real, cfg.reference, image_size(images))
    if cfg.per_class and not labelled(images):
        raise Refusal(f"per_class=true: images={cfg.images} has no classes.")
    if cfg.out is None:
        raise Refusal("Missing required setting: out=FILE, for the results. Images have no run folder to keep them in.")
    return Comparison(images, str(cfg.images), against, output(cfg, None))


def evaluation(cfg: DictConfig) -> Evaluation:
    """A model of a checkpoint, and what is measured of it.

    Raises:
        ValueError: the checkpoint cannot be used, or what is asked for cannot be measured of its model.
    """
    place = Place.of(take(cfg.trainer, Compute))
    model = door.trained(cfg.checkpoint, cfg.ema, cfg.trust)
    check_guidance(cfg.guidance.scale, model.num_classes, model.facts.label_dropout)
    swept = cfg.task == "sweep"
    scored = ["fid"] if swept else [metric for metric in cfg.metrics if not known(metric).from_model]
    kind = "FOLDER, for sweep.csv and sweep.png" if swept else "FILE, for the results"
    if model.run_folder is None and cfg.out is None:
        raise Refusal(f"Missing required setting: out={kind}. The checkpoint is not in a run folder.")
    if model.run_folder is not None and cfg.out is None:
        RunFolder(model.run_folder).refuse_links()
    against = likelihood = sampled = None
    if scored:
        sampled = recipe(cfg, cfg.batch_size)
        against = against_model(cfg, model, scored)
    if "bits_per_dim" in cfg.metrics and not swept:
        settings = take(cfg.likelihood, BitsSettings, seed=cfg.seed)
        data = None if cfg.reference is None else str(cfg.reference)
        likelihood = Likelihood(settings, likelihood_data(cfg, model, settings.split), data)
    kept = None if cfg.samples is None else Kept(Path(cfg.samples), cfg.overwrite)
    published = (cfg.split, cfg.reference) == ("train", None)
    arguments = (model, place, output(cfg, model), sampled, against, cfg.num_images, likelihood, kept, published)
    if swept:
        others = {words: swept_sampler(words) for words in cfg.sweep.samplers}
        made: Evaluation = SweepEvaluation(*arguments, sweep=take(cfg.sweep, Sweep), others=others)
    else:
        made = Evaluation(*arguments)
    if cfg.out is None and (why := obstacle(made.output.folder)):
        word = "out=FOLDER" if swept else "out=FILE"
        raise Refusal(f"checkpoint={cfg.checkpoint}: {why}, so nothing can be kept there: give {word}.")
    made.check()
    return made


def swept_sampler(words: str) -> tuple[Factory, Plan]:
    """A sampler of the list `sweep.samplers`, which is taken at every number of steps of the sweep."""
    steps = "sweep.num_steps sets the number of steps"
    made, plan = chosen_sampler(words, "sweep.samplers", {"num_steps": steps, "max_calls": steps})
    if not isinstance(plan.spacing, str):
        refuse_times(f"sweep.samplers: {words!r}: spacing", plan.spacing)
    return made, plan


# ---- what scores are against ----


def against_model(cfg: DictConfig, model: Trained, scored: list[str]) -> Against:
    """The extractor, metrics and real images that a model's samples are scored by."""
    own = door.data_of(model, cfg.data.root, cfg.split) if cfg.reference is None else None
    near = beside(cfg.reference, None) or cfg.data.root or model.record.at("data.root")
    extractor = extractors.extractor(choice_for(cfg, model), own, near)
    real = given("reference", cfg.reference, cfg.split, extractor) if own is None else own
    extractor.check(*model.image_shape[:2])
    if cfg.per_class and not model.num_classes:
        raise Refusal(f"per_class=true: the model of checkpoint={cfg.checkpoint} has no classes.")
    named = cfg.reference or f"{real.root or 'memory'} ({model.data_name}, {cfg.split})"
    return against_of(cfg, extractor, real, named, model.image_shape[1:], scored)


def choice_for(cfg: DictConfig, model: Trained) -> Choice:
    """The extractor that is asked for; that of the digits for a model of them, by name: its paths are the
    checkpoint's."""
    choice = take(cfg.extractor, Choice)
    asked = choice.weights is not None or choice.target is not None or "extractor" in typed().options
    if not asked and choice.name == "inception" and model.record.at("extractor.name") == "digits":
        return Choice("digits")
    return choice


def against_of(
    cfg: DictConfig,
    extractor: Extractor,
    real: Given,
    named: str,
    size: tuple[int, int],
    scored: list[str] | None = None,
) -> Against:
    """The same, once the sets are there and held against each other."""
    scored = list(cfg.metrics) if scored is None else scored
    metrics = parts.metrics(scored)
    try_out(extractor, extractor.channels, size[0], metrics)
    where = f"reference={cfg.reference or real.root or 'null'}"
    check_real(scored, len(image_set(real)), where)
    if cfg.per_class and not labelled(real):
        raise Refusal(f"per_class=true: {where} has no labels.")
    if size != image_size(real):
        (height, width), (h, w) = size, image_size(real)
        raise Refusal(f"The images have {width}x{height} pixels, the reference has {w}x{h}: scores need one size.")

    def reference(extractor: Extractor, ranks: Ranks) -> Reference | None:
        if isinstance(real, ImageShardsDataModule):
            return extractors.reference(real, extractor, ranks)
        return reference_of(real, extractor, ranks)

    return Against(extractor, metrics, real, reference, str(named), cfg.split, cfg.per_class, cfg.neighbours)


def beside(*paths: str | None) -> str | None:
    """The data set that the digits' extractor lies beside, if one of the paths is one."""
    return next((path for path in paths if path is not None and (Path(path) / INDEX_NAME).is_file()), None)


def given(key: str, path: str, split: str, extractor: Extractor) -> Given:
    """The set that a setting names: shards, or files."""
    if is_remote(path) or (Path(path) / INDEX_NAME).is_file():
        module = ImageShardsDataModule(path, batch_size=1, split=split)
        if module.channels != extractor.channels:
            extractor.check(module.channels, module.image_size)
        return module
    if (Path(path) / "samples.npz").is_file():  # a folder that `sample` made
        path = str(Path(path) / "samples.npz")
    return ImageFiles(path, key, extractor.channels)


def likelihood_data(cfg: DictConfig, model: Trained, wanted: str | None) -> ImageShardsDataModule:
    """The split that bits per dimension are of, of the model's data set or of the reference, if that is one."""
    reference = cfg.reference
    if reference is None:
        of = lambda split: door.data_of(model, cfg.data.root, split)  # noqa: E731
    elif is_remote(reference) or (Path(reference) / INDEX_NAME).is_file():
        of = lambda split: ImageShardsDataModule(reference, batch_size=1, split=split)  # noqa: E731
    else:
        raise Refusal(f"metrics=[bits_per_dim] needs a data set; reference={reference} is none.")
    there = of(None if reference is None else "train").index.splits
    split = wanted or ("test" if "test" in there else "train")
    if split not in there:
        raise Refusal(f"likelihood.split={split}: the data set has no such split. It has: {', '.join(there)}.")
    return of(split)


# ---- where it goes ----


def output(cfg: DictConfig, model: Trained | None) -> Output:
    """The folder that is written to, and the files that are."""
    swept, run = cfg.task == "sweep", None if model is None else model.run_folder
    if cfg.out is None:
        evaluations = run / "evaluations"
        picture = evaluations / f"neighbours_step_{model.step:08d}.png"
        return Output("checkpoint", run, evaluations, picture, run, evaluations / "sweep.csv" if swept else None)
    out = Path(cfg.out)
    if swept:
        return Output("out", out, out, None, None, out / "sweep.csv")
    return Output("out", out.parent, out.parent, out.parent / f"{out.stem}_neighbours.png", None, out)
