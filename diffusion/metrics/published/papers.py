"""Tables of the papers, as printed, and where each stands.

Knows no result of ours: `place` holds results against these. A figure that several tables print is stated once, and is
the same object in each.
"""

from typing import Any

from diffusion.metrics.published.table import Column, Figure, Line, Sampling, Table, line, printed

DDPM = "Ho et al. 2020 (arXiv:2006.11239)"
DDIM = "Song et al. 2021 (DDIM, arXiv:2010.02502)"
NCSNV2 = "Song & Ermon 2020 (NCSNv2, arXiv:2006.09011)"
SCORE_SDE = "Song et al. 2021 (score SDE, arXiv:2011.13456)"
SIGMA_HAT = "σ̂"  # DDIM's name for ancestral sampling with the large variance
SCHEDULE, TIMESTEPS = "vp_linear", 1000  # of the models of DDPM and DDIM
LARGE_PARAMETERS = 200_000_000  # between the 114 and the 256 million of the two networks for LSUN


# ---- DDPM ----


def ours(title: str, figures: str, section: str = "", **of: Any) -> Line:
    """The line of a model as DDPM's are: unconditional, of the linear schedule, without a learned variance."""
    return line(title, figures, section, **{"conditional": False, "learned": False, "schedule": SCHEDULE} | of)


DDPM_CIFAR10 = Table(
    "CIFAR-10", DDPM, "Table 1", 32,
    (
        Column("IS", "is", "cifar10"),
        Column("FID", "fid", "cifar10"),
        Column("FID to test", "fid", "cifar10", split="test"),
        Column("bits/dim, test", "bits_per_dim", "cifar10", split="test"),
        Column("bits/dim, train", "bits_per_dim", "cifar10"),
    ),
    (
        line("EBM", "8.30 37.9 - - -", "Conditional"),
        line("JEM", "8.76 38.4 - - -", "Conditional"),
        line("BigGAN", "9.22 14.73 - - -", "Conditional"),
        line("StyleGAN2 + ADA (v1)", "10.06 2.67 - - -", "Conditional"),
        line("Diffusion (original)", "- - - ≤5.40 -", "Unconditional"),
        line("Gated PixelCNN", "4.60 65.93 - 3.03 2.90", "Unconditional"),
        line("Sparse Transformer", "- - - 2.80 -", "Unconditional"),
        line("PixelIQN", "5.29 49.46 - - -", "Unconditional"),
        line("EBM", "6.78 38.2 - - -", "Unconditional"),
        line("NCSNv2", "- 31.75 - - -", "Unconditional"),
        line("NCSN", "8.87±0.12 25.32 - - -", "Unconditional"),
        line("SNGAN", "8.22±0.05 21.7 - - -", "Unconditional"),
        line("SNGAN-DDLS", "9.09±0.10 15.42 - - -", "Unconditional"),
        line("StyleGAN2 + ADA (v1)", "9.74±0.05 3.26 - - -", "Unconditional"),
        ours("DDPM, L", "7.67±0.13 13.51 - ≤3.70 3.69", "Unconditional", prediction="epsilon", loss="bound"),
        ours("DDPM, L_simple", "9.46±0.11 3.17 5.24 ≤3.75 3.72", "Unconditional", loss="simple"),
    ),
    Sampling(("ancestral",), num_steps=1000, variance="large", clip_x0=True),
    any_sampler=True,
    note="FID to the test split is in sec. 4.1. The paper reports the checkpoint of the lowest FID over training.",
)  # fmt: skip

BOUND, SIMPLE = (found.figures for found in DDPM_CIFAR10.lines[-2:])


def ablation(title: str, figures: str | tuple[Figure | None, ...], **of: Any) -> Line:
    found = line(title, figures).figures if isinstance(figures, str) else figures
    return Line(title, found, ours(title, "", **of).of)


DDPM_OBJECTIVES = Table(
    "CIFAR-10, what is predicted and by which objective", DDPM, "Table 2", 32,
    (Column("IS", "is", "cifar10"), Column("FID", "fid", "cifar10")),
    (
        ablation("μ, L, learned diagonal Σ", "7.28±0.10 23.69", prediction="mu", loss="bound", learned=True),
        ablation("μ, L, fixed isotropic Σ", "8.06±0.09 13.22", prediction="mu", loss="bound", learned=False),
        ablation("μ, mean squared error", "unstable unstable", prediction="mu", loss="mse", learned=False),
        ablation("ε, L, learned diagonal Σ", "unstable unstable", prediction="epsilon", loss="bound", learned=True),
        ablation("ε, L, fixed isotropic Σ", BOUND[:2], prediction="epsilon", loss="bound", learned=False),
        ablation("ε, L_simple", SIMPLE[:2], prediction="epsilon", loss="simple", learned=False),
    ),
    DDPM_CIFAR10.sampling,
    only_alike=True,
)  # fmt: skip

LSUN_SETS = {"lsun_bedroom": "LSUN bedroom", "lsun_church": "LSUN church", "lsun_cat": "LSUN cat"}

DDPM_LSUN = Table(
    "LSUN 256x256", DDPM, "Table 3", 256,
    tuple(Column(f"FID, {title.split()[1]}", "fid", data) for data, title in LSUN_SETS.items()),
    (
        line("ProgressiveGAN", "8.34 6.42 37.52"),
        line("StyleGAN", "2.65 4.21 8.53"),
        line("StyleGAN2", "- 3.86 6.93"),
        ours("DDPM, L_simple", "6.36 7.89 19.75", loss="simple", large=False),
        ours("DDPM, L_simple, large", "4.90 - -", loss="simple", large=True),
    ),
    Sampling(("ancestral",), num_steps=1000, variance="small", clip_x0=True),
    any_sampler=True,
    note="Scored with the code of StyleGAN2.",
)  # fmt: skip

DDPM_RATE = Table(
    "CIFAR-10, the code length of L_simple in two parts", DDPM, "sec. 4.3", 32,
    (
        Column("rate, bits/dim", "bits_per_dim", "cifar10", split="test", value="rate"),
        Column("distortion, bits/dim", "bits_per_dim", "cifar10", split="test", value="distortion"),
    ),
    (ours("DDPM, L_simple", "1.78 1.97", loss="simple", reverse_steps=None),),
    only_alike=True,
)  # fmt: skip

DDPM_RATE_DISTORTION = Table(
    "CIFAR-10, rate and distortion of progressive coding", DDPM, "Table 4", 32,
    (
        Column("rate, bits/dim", "bits_per_dim", "cifar10", split="test", value="rate"),
        Column("distortion, RMSE of 255", "bits_per_dim", "cifar10", split="test", value="rmse_255"),
    ),
    tuple(
        line(f"{reverse_steps:,} reverse steps", figures, reverse_steps=reverse_steps)
        for reverse_steps, figures in {
            1000: "1.77581 0.95136", 900: "0.11994 12.02277", 800: "0.05415 18.47482", 700: "0.02866 24.43656",
            600: "0.01507 30.80948", 500: "0.00716 38.03236", 400: "0.00282 46.12765", 300: "0.00081 54.18826",
            200: "0.00013 60.97170", 100: "0.00000 67.60125",
        }.items()
    ),
    only_alike=True,
)  # fmt: skip

# ---- DDIM ----


def of_eta(eta: float | str, *figures: str | Figure | None) -> Line:
    """The line of one eta; sigma hat for ancestral sampling with the large variance. All are of models of L_simple."""
    title = eta if isinstance(eta, str) else f"η = {eta:g}"
    found = tuple(printed(f) if isinstance(f, str) else f for f in figures)
    return Line(title, found, ours(title, "", eta=eta, loss="simple", large=False).of)


def over_steps(title: str, place: str, data: str, image_size: int, spacing: str, *lines: Line) -> Table:
    """FID on one set by eta and number of steps."""
    columns = tuple(Column(f"{steps:,} steps", "fid", data, steps=steps) for steps in (10, 20, 50, 100, 1000))
    sampling = Sampling(("ddim", "ancestral"), spacing=spacing)
    return Table(title, DDIM, place, image_size, columns, lines, sampling)


DDIM_CIFAR10 = over_steps(
    "FID on CIFAR-10", "Table 1", "cifar10", 32, "quadratic",
    of_eta(0.0, "13.36", "6.84", "4.67", "4.16", "4.04"),
    of_eta(0.2, "14.04", "7.11", "4.77", "4.25", "4.09"),
    of_eta(0.5, "16.66", "8.35", "5.25", "4.46", "4.29"),
    of_eta(1.0, "41.07", "18.36", "8.01", "5.78", "4.73"),
    of_eta(SIGMA_HAT, "367.43", "133.37", "32.72", "9.99", SIMPLE[1]),
)  # fmt: skip

DDIM_CELEBA = over_steps(
    "FID on CelebA 64x64", "Table 1", "celeba_64", 64, "linear",
    of_eta(0.0, "17.33", "13.73", "9.17", "6.53", "3.51"),
    of_eta(0.2, "17.66", "14.11", "9.51", "6.79", "3.64"),
    of_eta(0.5, "19.86", "16.06", "11.01", "8.09", "4.28"),
    of_eta(1.0, "33.12", "26.03", "18.48", "13.93", "5.98"),
    of_eta(SIGMA_HAT, "299.71", "183.83", "71.71", "45.20", "3.26"),
)  # fmt: skip

BEDROOM, CHURCH = DDPM_LSUN.lines[3].figures[:2]  # of 1,000 steps with the small variance: eta = 1, as the caption says

DDIM_BEDROOM = over_steps(
    "FID on LSUN bedroom", "Table 3", "lsun_bedroom", 256, "linear",
    of_eta(0.0, "16.95", "8.89", "6.75", "6.62", None),
    of_eta(1.0, "42.78", "22.77", "10.81", "6.81", BEDROOM),
)  # fmt: skip

DDIM_CHURCH = over_steps(
    "FID on LSUN church", "Table 3", "lsun_church", 256, "linear",
    of_eta(0.0, "19.45", "12.47", "10.84", "10.58", None),
    of_eta(1.0, "51.56", "23.37", "11.16", "8.27", CHURCH),
)  # fmt: skip

# ---- score models ----

LANGEVIN = Sampling(("langevin",))

NCSN_CIFAR10 = Table(
    "CIFAR-10, score networks and annealed Langevin dynamics", NCSNV2, "Table 1", 32,
    (Column("IS", "is", "cifar10"), Column("FID", "fid", "cifar10")),
    (
        Line("NCSN", DDPM_CIFAR10.lines[10].figures[:2]),
        line("NCSN, denoised at the end", "7.32±0.12 29.8"),
        Line("NCSNv2", (printed("8.73±0.13"), DDPM_CIFAR10.lines[9].figures[1])),
        line("NCSNv2, denoised at the end", "8.40±0.07 10.87"),
    ),
    LANGEVIN,
)  # fmt: skip

NCSN_CELEBA = Table(
    "CelebA 64x64, score networks and annealed Langevin dynamics", NCSNV2, "Table 1", 64,
    (Column("FID", "fid", "celeba_64"),),
    (
        line("NCSN", "26.89"),
        line("NCSN, denoised at the end", "25.30"),
        line("NCSNv2", "28.86"),
        line("NCSNv2, denoised at the end", "10.23"),
    ),
    LANGEVIN,
)  # fmt: skip

FLOW_CIFAR10 = Table(
    "CIFAR-10, likelihood by the probability flow", SCORE_SDE, "Table 2", 32,
    (Column("bits/dim, test", "bits_per_dim", "cifar10", split="test", likelihood="ode"),),
    (
        ours("DDPM", "3.28", loss="simple"),
        ours("DDPM continuous, VP", "3.21", loss="simple", schedule="vp_continuous"),
        ours("DDPM continuous, sub-VP", "3.05", loss="simple", schedule="sub_vp"),
        line("DDPM++ continuous, VP", "3.16"),
        line("DDPM++ continuous, sub-VP", "3.02"),
        line("DDPM++ continuous, deep, VP", "3.13"),
        line("DDPM++ continuous, deep, sub-VP", "2.99"),
    ),
)  # fmt: skip

TABLES = (
    DDPM_CIFAR10, DDPM_OBJECTIVES, DDPM_LSUN, DDPM_RATE, DDPM_RATE_DISTORTION,
    DDIM_CIFAR10, DDIM_CELEBA, DDIM_BEDROOM, DDIM_CHURCH,
    NCSN_CIFAR10, NCSN_CELEBA, FLOW_CIFAR10,
)  # fmt: skip
