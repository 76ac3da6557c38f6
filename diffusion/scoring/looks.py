"""What a run is looked at for, while it trains and at its end."""

from dataclasses import dataclass, field

from diffusion.settings import Count, Number, settings


@settings("callbacks.grid")
@dataclass(frozen=True)
class Grids:
    """Grids of samples.

    Args:
        every_steps: 0: at the end alone. num_images: in each. batch_size: images at a time, by one process.
    """

    every_steps: Number = 20_000
    num_images: Count = 64
    batch_size: Count = 16


@settings("callbacks.score.during")
@dataclass(frozen=True)
class During:
    """How scores while training differ from those at the end.

    Args:
        num_images: None: as many. num_steps: of DDIM; None: the run's own sampler.
    """

    num_images: Count | None = None
    num_steps: Count | None = None


@settings("callbacks.score")
@dataclass(frozen=True)
class Scores:
    """Scores of samples.

    Args:
        every_steps: 0: at the end alone. num_images: at the end. batch_size: images at a time, by one process.
    """

    every_steps: Number = 0
    num_images: Count = 50_000
    batch_size: Count = 256
    during: During = field(default_factory=During)

    @property
    def otherwise(self) -> bool:
        """Whether scores while training are of another number of images or another sampler than the final ones."""
        return self.during.num_steps is not None or self.during.num_images not in (None, self.num_images)


@settings("callbacks")
@dataclass(frozen=True)
class Looks:
    """All of it. enabled: False: nothing is sampled or scored, neither while training nor at its end."""

    enabled: bool = False
    grid: Grids = field(default_factory=Grids)
    score: Scores = field(default_factory=Scores)
