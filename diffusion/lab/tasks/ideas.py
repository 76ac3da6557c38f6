"""The ideas of the laboratory, each an equation beside the functions that work it out, for the pages of its tasks."""

import inspect
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from diffusion.config.composer import PACKAGE
from diffusion.lab.page import Function, Idea


class Told(NamedTuple):
    """title, equation, a few sentences, and what works it out, each as 'process.toy:Mixture.score'."""

    title: str
    equation: str
    text: str
    functions: tuple[str, ...]


IDEAS = {
    "score": Told(
        "The score of noised data",
        "score = grad log q(x_t) = sum_k r_k(x_t) C_k^-1 (alpha m_k - x_t),   C_k = alpha^2 S_k + sigma^2 I",
        "Noise turns a mixture of Gaussians into a mixture of wider ones, so its score stays known: a pull towards "
        "each mode, in proportion to the chance that the point has come from there.",
        ("process.toy:Mixture.score", "process.toy:Mixture.denoiser"),
    ),
    "dsm": Told(
        "DDPM is denoising score matching",
        "E sigma^2 |s_theta(x_t, t) + epsilon / sigma|^2  =  E |epsilon_theta(x_t, t) - epsilon|^2,\n"
        "s_theta = -epsilon_theta / sigma",
        "The score of x_t given x_0 is -epsilon / sigma, and its mean given x_t is the score of the noised data: a "
        "network "
        "that guesses the noise has learned the score. Weighted by sigma^2 its squared error is that of the noise.",
        ("objective:DSM", "objective:Simple"),
    ),
    "variables": Told(
        "VP and VE are one process",
        "y = x / alpha,   r = sigma / alpha:   y_t = x_0 + r_t epsilon",
        "Dividing by alpha turns one into the other. x0 and epsilon are the same in both, and so is what a network is "
        "fed, x_t / sqrt(alpha^2 + sigma^2).",
        ("process.variables:Exploding", "process.variables:carried", "lab.equivalence:walk_both"),
    ),
    "langevin": Told(
        "Langevin dynamics, and why they need annealing",
        "x + h score + sqrt(2 h) z",
        "Moves uphill with noise sample from the law whose score it is, if they get everywhere. Between modes that "
        "are far "
        "apart lies nothing to cross, and no data to learn a score from: each chain stays in the mode that it came to "
        "first, and the shares are those of the start's surroundings. In noise the modes are one. Annealed, from the "
        "noisiest level down, chains choose while they still can.",
        ("samplers.langevin:LangevinDynamics", "samplers.annealed:AnnealedLangevin"),
    ),
    "ladder": Told(
        "How many levels, how far apart, how long a step",
        "C(gamma) = Phi(sqrt(2 D) (gamma - 1) + 3 gamma) - Phi(sqrt(2 D) (gamma - 1) - 3 gamma);\n"
        "s_T^2 / sigma^2 = (1 - h)^(2 T) (gamma^2 - b) + b,   b = 2 / (2 - h)",
        "In many dimensions noise lies in a shell. Neighbouring levels must overlap for a chain to find its way from "
        "one to "
        "the next, and a few updates at each must bring it to rest there: NCSNv2's rules, from the data's size alone.",
        ("process.ladder:overlap", "process.ladder:settled", "process.ladder:ladder"),
    ),
    "corrector": Told(
        "Predictor and corrector",
        "down by any sampler, then x + h score + sqrt(2 h) z at the level it has come to",
        "The corrector mends the law, not the point: it need not know what went wrong.",
        ("samplers.predictor_corrector:PredictorCorrector", "samplers.predictor_corrector:LangevinCorrector"),
    ),
    "flow": Told(
        "The probability flow",
        "dy/dr = epsilon(y, r),   y = x / alpha,   r = sigma / alpha",
        "A law of motion without noise that carries the law at one time to that at another. DDIM takes steps along it.",
        ("process.toy:Mixture.flow", "samplers.ddim:DDIM"),
    ),
    "class": Told(
        "What a point tells of its class",
        "I(class; x_t) = H(class) - E H(class | x_t)",
        "All of it at first, nothing in the end. Where the curve falls modes merge, and a sampler decides.",
        ("lab.plane:class_bits",),
    ),
    "shares": Told(
        "Interval and test",
        "(p + z^2/2n ± z sqrt(p (1 - p) / n + z^2/4n^2)) / (1 + z^2/n);   sum_k (n_k - n w_k)^2 / (n w_k)",
        "An interval for the share of each class, and one number for all of them together.",
        ("lab.modes:wilson", "lab.modes:shares"),
    ),
    "sum": Told(
        "Three errors, and why their sum is at least the whole",
        "W2(sampled, data)  <=  initialisation + training + discretisation",
        "A walk is mended of one error at a time. Each mending moves its end by that error's part, and a way of three "
        "legs is at least as long as the straight one.",
        ("lab.errors:of_gaussian", "lab.errors:of_mixture"),
    ),
    "gaussian": Told(
        "The law of a walk on Gaussian data",
        "x_s = A x_t + b + C z:   N(m, S) -> N(A m + b, A S A^T + C C^T)",
        "The exact denoiser of a Gaussian is affine, so nothing has to be sampled.",
        ("lab.gaussian:step_of", "lab.gaussian:w2"),
    ),
    "initialisation": Told(
        "The error of initialisation",
        "W2(law of x_T, N(0, std_T^2 I)),   std^2 = alpha^2 + sigma^2",
        "Noised data are never quite noise: a little of their mean, and of their shape, is left.",
        ("lab.gaussian:prior_at", "lab.initialisation:of_mixture"),
    ),
    "irreducible": Told(
        "What no denoiser avoids",
        "E|D - x_0|^2  =  E|D* - x_0|^2 + E|D - D*|^2,   D*(x_t) = E[x_0 | x_t]",
        "A loss curve does not go to 0, it goes to the first part.",
        ("lab.gaussian:denoising_error", "lab.training_error:of_known"),
    ),
    "bounds": Told(
        "Bounds of the best denoiser's loss",
        "loss of a posterior mean among known images  <=  E|D* - x_0|^2  <=  loss of D, less what a change of D gains",
        "Nobody knows D*. But nothing does better on a set of images than the posterior mean among them, and no "
        "function of x_t could mend what D* leaves undone.",
        ("lab.training_error:of_images", "lab.training_error:posterior_mean", "lab.training_error:affine_gains"),
    ),
    "noise": Told(
        "Steps compared without chance",
        "z  =  sum over short steps v -> u of  c(u, s) std(v, u) z_u / std(t, s)",
        "The noise of a long step is made of that of the short ones it stands for, so that walks of different lengths "
        "lead to the same image but for their discretisation.",
        ("lab.refinement:SharedNoise", "lab.refinement:order_of_gaps"),
    ),
    "carried": Told(
        "What an error on the way does to the end",
        "moved_s = A moved_t + c error_t",
        "Each step adds its own error and carries on those before it, as it would on Gaussian data.",
        ("lab.training_error:carried_to_the_end",),
    ),
}


def ideas(*names: str) -> list[Idea]:
    """With the docstrings of the functions that work them out."""
    found = []
    for told in map(IDEAS.__getitem__, names):
        functions = [described(name) for name in told.functions]
        found.append(Idea(told.title, told.equation, told.text, functions))
    return found


def described(name: str) -> Function:
    """A function or class by its name here, with the file it stands in and its docstring."""
    module, _, attribute = name.partition(":")
    value: Any = import_module(f"diffusion.{module}")
    for part in attribute.split("."):
        value = getattr(value, part)
    code = Path(inspect.getsourcefile(inspect.unwrap(value)) or "").relative_to(PACKAGE.parent)
    return Function(attribute, code.as_posix(), inspect.getdoc(value) or "")
