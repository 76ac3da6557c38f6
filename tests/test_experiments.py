"""Every experiment composes, passes the checks, and builds with the paper's settings."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from diffusion.app import build
from diffusion.app.check import check
from diffusion.app.compose import conf_dir, groups
from diffusion.denoiser import NetworkDenoiser
from diffusion.training.module import DiffusionModule


def composed(*words):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("train", overrides=list(words))
    OmegaConf.resolve(cfg)
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
    sampler, times = build.sampler(cfg, schedule)
    assert times[-1] == 0 and len(times) - 1 == (cfg.sampler.num_steps or cfg.schedule.num_timesteps)
    module = DiffusionModule(
        denoiser, build.objective(cfg, schedule), build.optimizer(cfg), label_dropout=cfg.objective.label_dropout
    )
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
    assert (cfg.optimizer.warmup_steps, cfg.optimizer.gradient_clip) == (5000, 1.0)
    assert (cfg.ema.decay, cfg.ema.warmup) == (0.9999, False)
    assert cfg.sampler._target_.endswith("Ancestral") and cfg.sampler.num_steps is None
    assert (cfg.schedule.num_timesteps, cfg.schedule.beta_start, cfg.schedule.beta_end) == (1000, 1e-4, 0.02)


@pytest.mark.parametrize("group", ["schedule", "objective", "sampler", "guidance", "optimizer", "model"])
def test_every_option_of_a_group_builds(group):
    for option in groups()[group]:
        conditional = ["model.num_classes=10", "objective.label_dropout=0.1"]
        words = [f"{group}={option}"] + (conditional if option == "classifier_free" else [])
        words += ["objective=hybrid"] if option == "ancestral_learned" else []
        cfg = composed("+experiment=cifar10", *words)
        if cfg.model.image_size % 2 ** (len(cfg.model.multipliers) - 1) == 0:
            check(cfg)
        schedule = build.schedule(cfg)
        build.objective(cfg, schedule), build.sampler(cfg, schedule), build.optimizer(cfg)
        with torch.device("meta"):
            network = build.network(cfg)
        denoiser = NetworkDenoiser(network, schedule, cfg.objective.prediction)
        where = build.Place(torch.device("cpu"), "32", torch.contiguous_format)
        assert callable(build.sampled(cfg, denoiser, denoiser, where)), option


def test_no_experiment_means_digits():
    plain, named = composed("+experiment=digits"), composed("+experiment=digits", "name=digits")
    assert plain == named and plain.data.name == "digits"
