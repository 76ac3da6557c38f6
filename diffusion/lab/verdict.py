"""Which error is largest, and the cheapest setting to change, in words. Knows the numbers and the names of settings."""

from typing import NamedTuple

from diffusion.images import LEVELS_PER_UNIT
from diffusion.lab.errors import Parts
from diffusion.lab.images import Candidate, Discretisation, Initialisation, Training

QUARTERS = ("cleanest", "second", "third", "noisiest")
WORTH_IT = 0.8  # of the distance: a change that leaves more of it is not advised
NOTHING = 1e-12  # a total below it is rounding


class Verdict(NamedTuple):
    """dominant: initialisation, training, discretisation, "open" where bounds overlap, or "none". words: sentences."""

    dominant: str
    words: list[str]


class Walk(NamedTuple):
    """What can be changed of a walk: its first time and number of steps, of a schedule's T; and whether the denoiser is
    a trained one, for which another schedule means to train again."""

    start: float
    num_steps: int
    num_timesteps: int
    trained: bool


def of_parts(parts: Parts, walk: Walk) -> Verdict:
    """The verdict when all errors are known exactly."""
    if parts.total < NOTHING and parts.sum < NOTHING:
        return Verdict("none", ["There is no error above rounding."])
    named = {name: getattr(parts, name) for name in ("initialisation", "training", "discretisation")}
    dominant = max(named, key=named.get)
    others = ", ".join(f"{name} {value:.3g}" for name, value in named.items() if name != dominant)
    words = [
        f"{dominant.capitalize()} dominates: {named[dominant]:.3g} of a sum of {parts.sum:.3g} ({others}); in all the "
        f"end of the walk is off by {parts.total:.3g}."
    ]
    cure = {
        "initialisation": begin_later(walk),
        "training": "The cheapest change: train longer, or on more data; more steps will not help.",
        "discretisation": more_steps(walk),
    }
    return Verdict(dominant, [*words, cure[dominant]])


def more_steps(walk: Walk) -> str:
    """The cure of an error of discretisation."""
    if walk.num_steps < walk.num_timesteps:
        more = min(2 * walk.num_steps, walk.num_timesteps)
        return f"The cheapest change: more steps, sampler.num_steps={more}."
    again = ", and to train again" if walk.trained else ""
    return f"All levels are visited already: another sampler, or a schedule of more levels{again}."


def begin_later(walk: Walk) -> str:
    """The cure of an error of initialisation."""
    if walk.start < walk.num_timesteps:
        return "The cheapest change: sampler.spacing=trailing, which begins at T, where less signal is left."
    retrain = ", which means to train again" if walk.trained else ""
    return f"The walk begins at T already: a schedule that ends in less signal is needed{retrain}."


def of_images(
    begun: Initialisation, steps: Discretisation, learned: Training, tried: list[Candidate], walk: Walk, unseen: bool
) -> Verdict:
    """Of a trained model. tried: other settings of the sampler, the present one first. unseen: whether the images were
    kept from training."""
    at_least, at_most = learned.effect
    init, disc = begun.effect, steps.effect
    words = [
        f"Of an image's pixels, root mean square on the scale of 0 to 255: initialisation {grey(init)}, discretisation "
        f"{grey(disc)}, training at least {grey(at_least)} and at most {grey(at_most)}."
    ]
    if at_least > max(init, disc):
        dominant = "training"
        words.append("Training dominates, even by the lower estimate of it.")
    elif max(init, disc) > at_most:
        dominant = "initialisation" if init > disc else "discretisation"
        words.append(f"{dominant.capitalize()} dominates, also by the upper estimate of training.")
    else:
        dominant = "open"
        larger = "initialisation" if init > disc else "discretisation"
        likely = (at_least * at_most) ** 0.5 > max(init, disc)
        words.append(
            f"Training dominates, most likely: unless its error is near the least it can be, when {larger} does."
            if likely
            else f"Training and {larger} cannot be told apart: the first dominates if it is near the most it can be."
        )
    if dominant != "training":
        words.append(begin_later(walk) if init > disc else cheapest_sampler(tried))
    if dominant in ("training", "open"):
        quarter = max(range(4), key=learned.by_quarter.__getitem__)
        words.append(
            f"Of training, what the {QUARTERS[quarter]} quarter of the noise levels can add is largest "
            f"({grey(learned.by_quarter[quarter])}): train longer (trainer.max_steps), or with a larger network."
        )
    if not unseen:
        words.append(
            "The images are among those the model was trained on: what it has learned by heart is no error to them."
        )
    return Verdict(dominant, words)


def cheapest_sampler(tried: list[Candidate]) -> str:
    """The least work that brings images clearly nearer to the finest walk's."""
    present, *others = tried
    better = [c for c in others if c.distance < WORTH_IT * present.distance]
    if not better:
        return (
            f"None of the other settings tried brings images of {present.num_steps} steps much nearer to those of the "
            f"finest walk ({grey(present.distance)} away)."
        )
    best = min(better, key=lambda c: (c.calls, c.distance))
    cost = "at no cost" if best.calls <= present.calls else f"at {best.calls / present.calls:.2g} times the work"
    return (
        f"The cheapest change: {best.words}, {cost}: {grey(best.distance)} from the finest walk's images in place of "
        f"{grey(present.distance)}."
    )


def grey(value: float) -> str:
    """In grey levels of 255."""
    return f"{LEVELS_PER_UNIT * value:.3g}"
