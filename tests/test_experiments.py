"""Every experiment composes, passes the checks, and builds with the paper's settings."""

import pytest
import torch
from omegaconf import OmegaConf
from sklearn.datasets import load_digits

from diffusion.build import parts as build
from diffusion.build.sampling import recipe
from diffusion.config.check import check
from diffusion.config.composer import compose, groups
from diffusion.config.metrics import known
from diffusion.config.values import fit_all
from diffusion.denoiser import NetworkDenoiser
from diffusion.distributed.place import Place
from diffusion.errors import Refusal
from diffusion.images import from_uint8
from diffusion.process.ladder import PUBLISHED_OVERLAP, ladder, largest_distance, overlap, step_size
from diffusion.training.module import DiffusionModule


def composed(*words):
    cfg = compose("train", words)
    OmegaConf.resolve(cfg)
    fit_all(cfg, "train")
    return cfg


@pytest.mark.parametrize("name", groups()["experiment"])
def test_experiment_composes_and_builds(name):
    cfg = composed(f"+experiment={name}")
    assert cfg.name == name
    check(cfg)
    assert build.data(cfg).batch_size == cfg.data.batch_size
    schedule = build.schedule(cfg)
    with torch.device("meta"):
        denoiser = NetworkDenoiser(build.network(cfg), schedule, cfg.objective.prediction)
    _, times = recipe(cfg).sampler_of(schedule)
    levels = cfg.sampler.num_steps or cfg.schedule.num_timesteps
    assert times[-1] == 0 and len(times) - 1 == levels * cfg.sampler.get("visits", 1)
    module = DiffusionModule(denoiser, build.objective(cfg, schedule), build.optimizer(cfg))
    x = torch.zeros(2, cfg.data.channels, cfg.data.image_size, cfg.data.image_size, device="meta")
    t = torch.ones(2, dtype=torch.long, device="meta")
    labels = torch.zeros(2, dtype=torch.long, device="meta") if cfg.model.num_classes else None
    loss = module._objective(denoiser.output(x, t, labels), x, x, x, t)
    assert loss.shape == (2,)


PAPER = {  # Ho et al. 2020, app. B; celeba_64: code of Song et al. 2021
    "cifar10": (35_746_307, 2e-4, 128, 800_000, "large", 0.1, True),
    "lsun_church": (113_673_219, 2e-5, 64, 1_200_000, "small", 0.0, True),
    "lsun_bedroom": (113_673_219, 2e-5, 64, 2_400_000, "small", 0.0, False),
    "lsun_bedroom_large": (255_677_955, 2e-5, 64, 1_150_000, "small", 0.0, False),
    "lsun_cat": (113_673_219, 2e-5, 64, 1_800_000, "small", 0.0, True),
    "celebahq": (113_673_219, 2e-5, 64, 500_000, "small", 0.0, True),
    "celeba_64": (78_700_803, 2e-4, 128, None, "large", 0.1, True),
}


@pytest.mark.parametrize("name", PAPER)
def test_recipe_is_the_papers(name):
    parameters, lr, batch, steps, variance, dropout, flip = PAPER[name]
    cfg = composed(f"+experiment={name}")
    with torch.device("meta"):
        assert sum(p.numel() for p in build.network(cfg).parameters()) == parameters
    assert (cfg.optimizer.lr, cfg.data.batch_size, cfg.sampler.variance) == (lr, batch, variance)
    assert (cfg.model.dropout, cfg.data.flip) == (dropout, flip)
    assert steps is None or cfg.trainer.max_steps == steps
    assert (cfg.lr_schedule.warmup_steps, cfg.optimizer.gradient_clip) == (5000, 1.0)
    assert (cfg.ema.decay, cfg.ema.warmup) == (0.9999, False)
    assert cfg.sampler._target_.endswith("Ancestral") and cfg.sampler.num_steps is None
    assert (cfg.schedule.num_timesteps, cfg.schedule.beta_start, cfg.schedule.beta_end) == (1000, 1e-4, 0.02)


def test_ncsn_cifar10_is_the_papers_in_our_units():
    """NCSNv2's ladder, step and number of updates, from its techniques and its code; images of twice the range."""
    cfg = composed("+experiment=ncsn_cifar10")
    published = ladder(0.01, 50, 3 * 32**2, visits=5, wanted=PUBLISHED_OVERLAP)
    assert (cfg.schedule.sigma_min, cfg.schedule.sigma_max) == (2 * published.sigma_min, 2 * published.sigma_max)
    assert (cfg.schedule.num_timesteps, cfg.sampler.visits) == (published.num_timesteps, published.visits)
    assert cfg.sampler.step_size == pytest.approx(published.step_size, rel=0.01) and cfg.sampler.denoise
    assert (cfg.sampler.convention, cfg.sampler.num_steps, cfg.sampler.clip_x0) == ("code", None, False)
    assert (cfg.optimizer.lr, cfg.data.batch_size, cfg.trainer.max_steps, cfg.ema.decay) == (1e-4, 128, 300_000, 0.999)
    assert (cfg.objective.prediction, cfg.objective.weight) == ("scaled_score", "sigma2")
    with torch.device("meta"):
        assert build.network(cfg).conditioning == "noise"


def test_ncsn_digits_has_the_ladder_that_the_digits_ask_for():
    cfg = composed("+experiment=ncsn_digits")
    digits = from_uint8(torch.from_numpy((load_digits().images * (255 / 16)).round()).to(torch.uint8))
    assert largest_distance(digits) == pytest.approx(cfg.schedule.sigma_max, rel=0.05)
    schedule = build.schedule(cfg)
    first, second = sorted(set(recipe(cfg).sampler_of(schedule)[1]))[-2:]
    ratio = float(schedule(second).sigma / schedule(first).sigma)
    assert overlap(ratio, 64) > PUBLISHED_OVERLAP, "no coarser than the published ladders"
    assert cfg.sampler.step_size == pytest.approx(step_size(ratio, cfg.sampler.visits), rel=0.05)


def test_what_a_sampler_was_told_is_recorded_flat():
    cfg = composed("+experiment=cifar10", "sampler=predictor_corrector", "sampler.corrector.snr=0.1")
    assert recipe(cfg).about() == {
        "predictor.variance": "large", "corrector.snr": 0.1, "corrector.norms": "image", "visits": 2,
        "spacing": "trailing", "clip_x0": False,
    }  # fmt: skip


@pytest.mark.parametrize("group", ["schedule", "objective", "sampler", "guidance", "optimizer", "model"])
def test_every_option_of_a_group_builds(group):
    for option in groups()[group]:
        conditional = ["model.num_classes=10", "objective.label_dropout=0.1"]
        words = [f"{group}={option}"] + (conditional if option == "classifier_free" else [])
        words += ["objective=hybrid"] if option == "ancestral_learned" else []
        words += ["data.image_size=8"] if option == "unet_8" else []
        cfg = composed("+experiment=cifar10", *words)
        if cfg.model.image_size % 2 ** (len(cfg.model.get("multipliers") or [1]) - 1) == 0:
            check(cfg)
        schedule = build.schedule(cfg)
        build.objective(cfg, schedule), recipe(cfg).sampler_of(schedule), build.optimizer(cfg)
        with torch.device("meta"):
            network = build.network(cfg)
        denoiser = NetworkDenoiser(network, schedule, cfg.objective.prediction)
        where = Place(torch.device("cpu"), "32", torch.contiguous_format)
        assert callable(recipe(cfg).denoiser(denoiser, denoiser, where)), option


def test_no_experiment_means_digits():
    plain, named = composed("+experiment=digits"), composed("+experiment=digits", "name=digits")
    assert plain == named and plain.data.name == "digits"


@pytest.mark.parametrize(
    "words, mentions",
    [
        (["data.toy=ring"], ["data.toy=ring", "modes, rings"]),
        (["callbacks=default"], ["data=mixture", "callbacks=none"]),
        (["model.blocks=0"], ["model.blocks=0"]),
        (["model.time_embedding=sine"], ["model.time_embedding=sine", "positional, fourier"]),
        (["sampler=annealed_langevin", "sampler.visits=0"], ["sampler.visits=0"]),
        (["sampler=annealed_langevin", "sampler.convention=half"], ["sampler.convention=half", "code, paper"]),
        (["sampler=predictor_corrector", "sampler.corrector.norms=mean"], ["sampler.corrector.norms=mean", "expected"]),
        (["schedule=sub_vp", "schedule.beta_max=0"], ["schedule.beta_max=0"]),
    ],
)
def test_what_the_score_based_family_cannot_be_is_refused_before_anything_is_built(words, mentions):
    with pytest.raises(Refusal) as refused:
        check(composed("+experiment=gmm", *words))
    assert all(mention in str(refused.value) for mention in mentions)


@pytest.mark.parametrize(
    "words, mentions",
    [
        (["callbacks.score.num_images=9"], "callbacks.score.num_images=9: is needs at least 10 images"),
        (["callbacks.score.num_images=3", "metrics=[precision]"], "precision needs at least 4 images, here are 3"),
        (["callbacks.score.every_steps=5", "callbacks.score.during.num_images=1"], "during.num_images=1: fid needs"),
        (["data=cifar10", "data.image_size=8", "metrics=[is]"], "extractor=digits takes 1-channel images of 8x8"),
        (["extractor=inception", "metrics=[kid]"], "extractor=inception takes 3-channel images of any size, and data"),
        (["extractor=custom", "extractor.name=a", "extractor.target=b", "extractor.image_size=9",
          "extractor.channels=1"], "extractor=a takes 1-channel images of 9x9 pixels, and data.image_size=8: give"),
    ],
)  # fmt: skip
def test_scores_that_a_run_could_not_make_are_refused_before_it_trains(words, mentions):
    with pytest.raises(Refusal) as refused:
        check(composed("+experiment=digits", *words))
    assert mentions in str(refused.value)


def test_a_metric_may_be_computed_of_as_few_images_as_its_class_says():
    for words in (
        ["metrics=[fid]", f"callbacks.score.num_images={known('fid').least_images}"],
        ["callbacks.score.during.num_images=1"],  # nothing is scored with it
        ["extractor=inception", "metrics=[]"],
    ):
        assert check(composed("+experiment=digits", *words)) is None
    with pytest.raises(Refusal, match="fid needs at least 2 images"):
        check(composed("+experiment=digits", "metrics=[fid]", "callbacks.score.num_images=1"))
