"""In what a result was made otherwise than the published figures it is held against, in plain words.

The papers' protocol (Ho et al. 2020, sec. 4.1 and app. B): 50,000 samples of the averaged weights, FID against the
50,000 training images of CIFAR-10, the Inception network of 2015, images as unconditional as the models. How a table's
samples were made stands with the table.
"""

from collections.abc import Callable, Iterator, Sequence

from diffusion.metrics.published.papers import DDIM, DDPM, DDPM_CIFAR10, SCHEDULE, SIGMA_HAT, TIMESTEPS
from diffusion.metrics.published.place import (
    LIKELIHOOD,
    Row,
    against_real,
    conditional,
    data_of,
    eta_of,
    of_samples,
    places,
    split_of,
    tables_about,
    tables_of,
)
from diffusion.metrics.published.table import Sampling

PUBLISHED_IMAGES = 50_000  # that published FID and IS are of
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"  # torch-fidelity's port
CIFAR10_IMAGES = {"train": 50_000, "test": 10_000}


def of_images(row: Row) -> Iterator[str]:
    """Numbers of images, on both sides."""
    number, real, split = row.get("num_images"), row.get("num_reference"), split_of(row)
    if of_samples(row):
        if number is not None and number < PUBLISHED_IMAGES:
            yield (
                f"{number:,} images where the papers score {PUBLISHED_IMAGES:,}: FID falls, and IS settles, as their "
                f"number grows."
            )
        elif number is not None and number > PUBLISHED_IMAGES:
            yield f"{number:,} images where the papers score {PUBLISHED_IMAGES:,}: FID falls as their number grows."
        wanted = CIFAR10_IMAGES.get(split)
        if against_real(row) and data_of(row) == "cifar10" and None not in (real, wanted):
            if real != wanted:
                yield f"{real:,} real images where the {split} split of CIFAR-10 has {wanted:,}."
    if row.get("name") == LIKELIHOOD and data_of(row) == "cifar10":
        wanted = CIFAR10_IMAGES.get(split)
        if None not in (number, wanted) and number != wanted:
            yield f"bits/dim of {number:,} images where the {split} split of CIFAR-10 has {wanted:,}."


def of_reference(row: Row) -> Iterator[str]:
    """The real images: their split, how they are stored, their size."""
    if against_real(row):
        if row.get("split") not in (None, "train"):
            line = DDPM_CIFAR10.lines[-1]
            _, train, test, *_ = line.figures
            yield (
                f"Real images of the {row['split']} split where the papers use the training images: on CIFAR-10 one "
                f"model has FID {train.text} against train and {test.text} against test."
            )
        if "jp" in str(row.get("reference_format") or "").lower():
            yield (
                "Real images stored as JPEG, samples not: the statistics of the compression count as a difference, "
                "at small sizes by more than 1 in FID. Prepare the set without loss."
            )
    size = row.get("image_size")
    for table in tables_of(row)[:1]:
        if size is not None and size != table.image_size:
            yield f"Images of {size}x{size} pixels where the table is about {table.image_size}x{table.image_size}."


def of_pixels(row: Row) -> Iterator[str]:
    """From floats to bytes."""
    rounding = row.get("rounding")
    if of_samples(row) and rounding not in (None, "nearest"):
        yield f"Pixels rounded by {rounding} and not to the nearest level: cutting off darkens images by half a level."


def of_extractor(row: Row) -> Iterator[str]:
    """Whose features these are."""
    name, digest = row.get("extractor"), row.get("extractor_sha256")
    if not of_samples(row) or name is None:
        return
    if name != "inception":
        yield f"Features of the {name} extractor where published scores are from Inception's."
    elif digest not in (None, INCEPTION_SHA256):
        yield (
            f"Inception weights with sha256 {digest[:8]}… where the 2015 network of the published scores, as "
            f"torch-fidelity ported it, has {INCEPTION_SHA256[:8]}…"
        )


def of_model(row: Row) -> Iterator[str]:
    """The weights, and what the model is told."""
    if row.get("weights") not in (None, "ema"):
        yield f"{row['weights'].capitalize()} weights where the papers score their moving average (ema)."
    guidance = row.get("guidance_scale")
    if conditional(row):
        guided = f", guided with scale {guidance:g}" if guidance not in (None, 1) else ""
        yield f"A model that is told the class{guided}, where the diffusion models of the tables are unconditional."
    schedule = row.get("schedule")
    if schedule not in (None, SCHEDULE) and any(table.paper in (DDPM, DDIM) for table in tables_of(row)):
        yield f"A model of schedule={schedule} where those of DDPM and DDIM have {SCHEDULE} of {TIMESTEPS:,} levels."
    if row.get("learned_variance") and row.get("variance") not in (None, "learned"):
        yield f"A model that has learned how wide a step is, by the {row['variance']} variance in place of its own."


def of_sampler(row: Row) -> Iterator[str]:
    """How the samples were made, for the tables that the result is put in; those made alike in one sentence."""
    if not of_samples(row) or row.get("sampler") is None:
        return
    alike: dict[tuple[str, Sampling], list[str]] = {}
    for table in tables_of(row):
        if table.sampling is not None:
            alike.setdefault((table.paper, table.sampling), []).append(table.place)
    for (paper, wanted), where in alike.items():
        yield from (f"{paper}, {' and '.join(where)}: {words}." for words in differently(row, paper, wanted))


def differently(row: Row, paper: str, wanted: Sampling) -> Iterator[str]:
    """What of the sampler is otherwise: its kind; or its steps, variance, spacing, clipping."""
    sampler, steps = row["sampler"], row.get("num_steps")
    if not any(name in sampler for name in wanted.samplers):
        yield f"sampled by {' or '.join(wanted.samplers)}, this by {sampler}"
        return
    if wanted.num_steps is not None and steps not in (None, wanted.num_steps):
        yield f"{wanted.num_steps:,} steps, here {steps:,}"
    if wanted.variance is not None and row.get("variance") not in (None, wanted.variance, "learned"):
        yield f"sampler.variance={wanted.variance} on this set, here {row['variance']}"
    shorter = (steps or 0) < TIMESTEPS  # with as many steps every spacing is the same
    if wanted.spacing is not None and row.get("spacing") not in (None, wanted.spacing) and shorter:
        yield f"sampler.spacing={wanted.spacing} on this set, here {row['spacing']}"
    # Ho et al. clip the estimate of x0, and so does DDIM's code for sigma hat; its general sampler does not.
    clipped, clips = row.get("clip_x0"), eta_of(row) == SIGMA_HAT if paper == DDIM else wanted.clip_x0
    if None not in (clipped, clips) and clipped != clips:
        yield f"sampler.clip_x0={str(clips).lower()}, here {str(clipped).lower()}"


PARTS: tuple[Callable[[Row], Iterator[str]], ...] = (
    of_images, of_reference, of_pixels, of_extractor, of_model, of_sampler
)  # fmt: skip


def deviations(row: Row) -> list[str]:
    """A sentence for each departure from the protocol of the papers, as far as the result says how it was made."""
    return [sentence for part in PARTS for sentence in part(row)]


def not_recorded(row: Row) -> list[str]:
    """Fields without which it cannot be said whether a result was made as the papers' were."""
    wanted = ["num_images", "split", "weights"]
    if of_samples(row):
        wanted += ["extractor", "sampler", "rounding"]
    return [name for name in wanted if row.get(name) is None]


def cause(row: Row) -> str:
    """Why a result has no place in any table, in a clause."""
    title, data, others = row.get("metric") or row.get("name") or "such scores", data_of(row), row.get("extractor")
    tables, found = tables_about(data), []
    if of_samples(row) and others not in (None, "inception"):
        found.append(f"features of the {others} extractor are not Inception's")
    if not tables:
        found.append(f"the papers' tables have nothing on {data}" if data else "its data set is not recorded")
    elif not any(c.metric == row.get("name") for table in tables for c in table.columns):
        found.append(f"the papers' tables give no {title} of {data}")
    elif not found:
        found.append("no line of the papers' tables was made like it")
    return ", and ".join(found)


def unplaced(rows: Sequence[Row]) -> list[str]:
    """A sentence for each reason why some of the rows have no place in any table."""
    about: dict[str, list[str]] = {}
    for row in rows:
        if not places(row):
            titles, title = about.setdefault(cause(row), []), str(row.get("metric") or row.get("name") or "a score")
            titles += [] if title in titles else [title]
    return [f"Not comparable with published scores: {', '.join(titles)}, as {why}." for why, titles in about.items()]


def common(rows: Sequence[Row], sentences: Callable[[Row], Sequence[str]]) -> list[str]:
    """The sentences of all rows, each once; one that is not about all of them begins with whom it is about."""
    about: dict[str, list[str]] = {}
    for row in rows:
        for sentence in sentences(row):
            title = str(row.get("metric") or row.get("name"))
            if title not in about.setdefault(sentence, []):
                about[sentence].append(title)
    titles = {str(row.get("metric") or row.get("name")) for row in rows}
    return [s if set(who) == titles else f"{' and '.join(who)}: {s}" for s, who in about.items()]
