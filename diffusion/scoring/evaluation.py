"""A trained model scored: its samples against real images, and the likelihood of a split of its data.

    with evaluation:
        rows = evaluation.rows(ranks, place)
        evaluation.write_samples()
        ...                                      the rows are kept
        evaluation.kept()

What is interrupted goes on with the pieces that were made before.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Self

from diffusion.data.module import ImageShardsDataModule
from diffusion.distributed.place import Place
from diffusion.distributed.ranks import Ranks
from diffusion.files import Room
from diffusion.metrics.metric import Metric
from diffusion.metrics.published import counterpart, places
from diffusion.metrics.reference import Reference
from diffusion.samplers.ddim import Eta
from diffusion.scoring.against import Against, Output
from diffusion.scoring.bits import Bits
from diffusion.scoring.bits import Settings as BitsSettings
from diffusion.scoring.gallery import Gallery, listed
from diffusion.scoring.pieces import Pieces
from diffusion.scoring.recipe import Recipe
from diffusion.scoring.sampling import Sampling
from diffusion.scoring.trained import Trained
from diffusion.settings import Count, Distinct, settings

TERMS = "terms_*"  # of a likelihood
MEASURED = "images measured in another way"


@settings("sweep")
@dataclass(frozen=True)
class Sweep:
    """Samplings whose scores are held against each other (Song et al. 2021, DDIM, table 1).

    Args:
        num_steps: of each. eta: of DDIM. large: also ancestral sampling with the large variance, the papers' sigma hat.
        samplers: further ones, options of the group sampler, each with settings of it.
    """

    num_steps: Annotated[list[Count], Distinct()]
    eta: Annotated[list[Eta], Distinct()]
    large: bool = True
    samplers: Annotated[list[str], Distinct()] = field(default_factory=list)


@dataclass(frozen=True)
class Likelihood:
    """A likelihood that is measured. module: of the split. data: what the user calls it, None: the model's own."""

    settings: BitsSettings
    module: ImageShardsDataModule
    data: str | None = None


@dataclass(frozen=True)
class Kept:
    """A folder of the user's for the samples. overwrite: also where it holds others."""

    folder: Path
    overwrite: bool = False


class Evaluation:
    """What is measured of a model.

    Args:
        model: that is sampled. place: it runs on. num_images: that are sampled and scored.
        recipe, against: how they are sampled, and what they are scored against; None: they are not.
        likelihood: that is measured, None: none is. samples: where samples are kept, None: nowhere.
        published: whether the scores are of the kind that papers publish: against the training split of its own data.
    """

    def __init__(
        self,
        model: Trained,
        place: Place,
        output: Output,
        recipe: Recipe | None = None,
        against: Against | None = None,
        num_images: int = 0,
        likelihood: Likelihood | None = None,
        samples: Kept | None = None,
        published: bool = True,
    ) -> None:
        self.model, self.place, self.output, self.recipe, self.against = model, place, output, recipe, against
        self.num_images, self.likelihood, self.samples, self.published = num_images, likelihood, samples, published
        self._pieces: list[Pieces] = []  # what the rows are made from
        self._galleries: list[Gallery] = []  # whose samples are to be written

    # ---- before it begins ----

    def check(self) -> None:
        """Build what the work will need, and let go of it. ValueError if something of it cannot be."""
        for recipe in self.recipes():
            gallery = self.gallery(recipe, Ranks(), self.place)
            if self.samples is not None:
                gallery.pieces.refuse_other()
        if self.likelihood is not None:
            self.bits(self.place, Ranks())

    def recipes(self) -> list[Recipe]:
        """How the model is sampled, each way once."""
        return [] if self.recipe is None else [self.recipe]

    def introduction(self) -> str:
        """What is about to be done, in a line or two."""
        model, lines = f"{self.model.path} (step {self.model.step}, {self.model.weights} weights)", []
        if self.against is not None:
            named, extractor = self.against.named, self.against.extractor.name
            lines.append(f"Scoring {self.num_images} images of {model} against {named} with extractor={extractor}")
        if self.likelihood is not None:
            bits = self.bits(self.place, Ranks())
            by = "the bound" if bits.settings.by == "bound" else "the flow"
            lines.append(
                f"Bits per dimension of {len(bits.numbers())} images of {bits.data}, split {bits.module.split}, "
                f"by {by} of {model}"
            )
        return "\n".join(lines)

    def rooms(self) -> list[Room]:
        """The folders that are written to, and what they need."""
        here, apart = [], []  # (bytes, what they are for)
        if self.against is not None:
            galleries = [self.gallery(recipe, Ranks(), self.place) for recipe in self.recipes()]
            needs = max(gallery.needs(self.against.extractor) for gallery in galleries)
            what = f"{self.num_images:,} images"
            if self.samples is None:
                here.append((needs, what))
            else:
                apart.append(Room("samples", self.samples.folder, needs + galleries[0].written(), what))
        if self.likelihood is not None:
            bits = self.bits(self.place, Ranks())
            here.append((bits.needs(), f"the likelihood of {len(bits.numbers()):,} images"))
        whole = sum(needs for needs, _ in here)
        return [*apart, Room(self.output.key, self.output.folder, whole, " and ".join(what for _, what in here))]

    # ---- the work, on all ranks ----

    def rows(self, ranks: Ranks, where: Place) -> list[dict[str, Any]]:
        """Sample, score, and say of each figure what it depends on; the rows on rank 0, none on others."""
        rows = []
        if self.against is not None and self.recipe is not None:
            self.against.extractor.network.to(where.device)
            reference = self.against.reference(self.against.extractor, ranks)
            rows = self.sampled(self.recipe, self.against.metrics, reference, ranks, where)
        if self.likelihood is not None:
            rows += self._bits_per_dim(ranks, where)
        return rows

    def sampled(
        self,
        recipe: Recipe,
        metrics: Mapping[str, Metric],
        reference: Reference | None,
        ranks: Ranks,
        where: Place,
        neighbours: bool = True,
    ) -> list[dict[str, Any]]:
        """Scores of the samples of a recipe; on rank 0."""
        model, against = self.model, self.against
        assert against is not None
        model.denoiser.network.to(where.device, memory_format=where.memory_format)
        gallery = self.gallery(recipe, ranks, where)
        self._pieces.append(gallery.pieces)
        gallery.make(against.extractor)
        if reference is None:
            return []
        about = {**gallery.record(), **model.about(), "split": against.split}
        about["data"] = model.data_name if self.published or against.named == model.data_name else against.named
        shown = gallery.images(against.neighbours) if against.neighbours and neighbours else None
        rows = against.rows(
            reference, gallery.features(against.extractor), gallery.labels(), shown, about, model.facts.paper,
            self.output.neighbours, ranks,
        )  # fmt: skip
        if self.samples is not None:
            self._galleries.append(gallery)
        return [self._with_published(row) for row in rows]

    def _with_published(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with the figure of the same thing beside it; the run's own `paper` where no table is about it."""
        about = {**self.model.facts.described, **row}
        figure = counterpart(about)
        if figure is not None or places(about) or not self.published:
            row["reference"] = None if figure is None else figure.value
        return row

    def _bits_per_dim(self, ranks: Ranks, where: Place) -> list[dict[str, Any]]:
        """The likelihood of a split of the model's data; on rank 0. The terms of a bound go to files of the run."""
        model, likelihood = self.model, self.likelihood
        assert likelihood is not None
        model.denoiser.network.to(where.device, memory_format=where.memory_format)
        bits = self.bits(where, ranks)
        pieces = self._measured(bits, ranks)
        numbers = bits.numbers()

        def measure(part: range) -> bool:
            pieces.write(TERMS, part, bits.measure(numbers[part.start : part.stop]))
            return True

        pieces.make(pieces.missing(TERMS), measure, "likelihood")
        with ranks.together():
            if ranks.main:
                parts = [pieces.read(TERMS, part) for part in pieces.parts(TERMS)]
                for path in bits.write(parts, self.output.folder):
                    print(f"Likelihood: {path}")
        if not ranks.main:
            return []
        mixed: dict[str, Any] = {}
        if len(sizes := pieces.batch_sizes(TERMS, likelihood.settings.batch_size)) > 1:
            mixed = {"batch_sizes": listed(sizes)}
            error = "rounding" if likelihood.settings.by == "bound" else "rounding and the solver's tolerance"
            print(f"likelihood: batch sizes {listed(sizes)} were mixed, which changes the result by {error} at most.")
        return [{**row, **mixed, "checkpoint_sha256": model.digest} for row in bits.rows(parts)]

    def _measured(self, bits: Bits, ranks: Ranks) -> Pieces:
        """Where the terms of a likelihood are kept. Which images are measured depends on their number."""
        count = len(bits.numbers())
        identity = [self.model.identity(), bits.identity(), bits.module.index.digest, count]
        folder = self.output.pieces / f"likelihood_{digest_of(identity)}"
        self._pieces.append(Pieces(folder, identity, ranks, count, bits.settings.batch_size, what=MEASURED))
        return self._pieces[-1]

    # ---- parts ----

    def bits(self, where: Place, ranks: Ranks) -> Bits:
        wanted = self.likelihood
        assert wanted is not None
        return Bits(self.model, where, wanted.module, wanted.settings, ranks.attend, wanted.data)

    def gallery(self, recipe: Recipe, ranks: Ranks, where: Place) -> Gallery:
        """The samples of a recipe."""
        model = self.model
        sampling = recipe.sampling(model.denoiser, where, model.image_shape, ranks.attend)
        about = {**model.identity(), "step": model.step}
        if self.samples is None:
            return Gallery(self.output.pieces / self.name(sampling), sampling, self.num_images, about, ranks)
        folder, setting = self.samples.folder / ".batches", f"samples={self.samples.folder}"
        return Gallery(folder, sampling, self.num_images, about, ranks, setting, self.samples.overwrite)

    def name(self, sampling: Sampling) -> str:
        """Of what a sampling of this model makes."""
        return f"samples_{digest_of([self.model.identity(), sampling.identity()])}"

    # ---- what is left when it ends ----

    def __enter__(self) -> Self:
        """A context: at its end the folders of what was made are released. Pieces stay until `kept` is called."""
        return self

    def __exit__(self, *error: Any) -> None:
        for pieces in self._pieces:
            pieces.__exit__(*error)
        self._pieces.clear()

    def write_samples(self) -> None:
        """The samples that are wanted. Before the rows are kept: what is interrupted while it writes, which may take
        long, goes on with the pieces, and keeps its rows once."""
        while self._galleries:
            self._galleries.pop().write(self.samples.folder)

    def kept(self) -> None:
        """The rows are: remove what all was made from. Not before, as what is interrupted goes on with those pieces."""
        while self._pieces:
            self._pieces.pop().remove()


def digest_of(identity: Any) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
