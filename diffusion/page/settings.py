"""What was trained, for how long, at what speed, with which settings and versions: words and figures of one run."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from diffusion.page.metrics_csv import Metrics
from diffusion.page.words import shown
from diffusion.progress import counted, duration
from diffusion.runs.recorded import at

Row = Mapping[str, Any]


def summary(record: Mapping[str, Any], step: int | None) -> str:
    """What was trained on what, for how long, in a sentence or two."""
    if not record:
        return "This folder has no config.yaml: what was trained is not known."
    network = (at(record, "model._target_") or "a network").rpartition(".")[2]
    size, channels, classes = (at(record, f"data.{k}") for k in ("image_size", "channels", "num_classes"))
    what = [f"{size}×{size} pixels"] if size else []
    what += [counted(channels, "channel", "channels")] if channels else []
    what += [counted(classes, "class", "classes")] if classes else []
    images = f"{at(record, 'data.name') or 'images'}" + (f" ({', '.join(what)})" if what else "")
    kind = "conditional " if at(record, "model.num_classes") else ""
    target, limit = at(record, "objective.prediction"), at(record, "trainer.max_steps")
    begun = "not trained yet" if not step else f"trained for {step:,}" + (f" of {limit:,}" if limit else "") + " steps"
    text = f"A {kind}{network}" + (f" that predicts {target}" if target else "") + f", {begun} on {images}."
    decay = at(record, "ema.decay")
    if decay is not None:
        ramp = " after a ramp" if at(record, "ema.warmup") else ""
        text += f" Samples show the averaged weights (decay {decay}{ramp}); so do scores that do not say otherwise."
    return text


def figures_of_training(record: Mapping, step: int | None, metrics: Metrics, results: Sequence[Row]) -> list[tuple]:
    """(name, value) of what a person asks first: steps, images, speed, time, size."""
    batch, limit = at(record, "data.batch_size"), at(record, "trainer.max_steps")
    found: list[tuple[str, str]] = []
    if step is not None:
        found.append(("steps", f"{step:,}" + (f" of {limit:,}" if limit and limit != step else "")))
    if step is not None and batch:
        found += [("images a step", shown(batch)), ("images seen", f"{step * batch:,}")]
    steps, rates = metrics.curve("train/images_per_second")
    if any(rate > 0 for rate in rates) and batch:
        timed = [(b - a, rate) for a, b, rate in zip([0, *steps[:-1]], steps, rates, strict=True) if rate > 0]
        rates, spent = [rate for _, rate in timed], sum(n * batch / rate for n, rate in timed)
        found += [("images/s", shown(float(f"{median(rates):.3g}")))]
        found += [("time a step", duration(batch / median(rates))), ("training time", duration(spent))]
    size = next((r["parameters"] for r in results if r.get("parameters")), None)
    if size:
        found.append(("parameters", shown(size)))
    return found


def origin(results: Sequence[Row]) -> list[tuple[str, str]]:
    """(name, value) of what made the newest score: commit, versions, the extractor's digest."""
    newest = results[0] if results else {}
    found = [("commit", newest["commit"])] if newest.get("commit") else []
    found += [(name, version) for name, version in (newest.get("versions") or {}).items()]
    if newest.get("extractor_sha256"):
        found.append((f"sha256 of the {newest.get('extractor')} extractor", newest["extractor_sha256"]))
    return found


def settings(record: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """[(group, [(key, value), ...]), ...]; keys that are in no group come first, under ''."""

    def text(value: Any) -> str:
        if isinstance(value, list):
            return f"[{', '.join(map(text, value))}]"
        return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

    def leaves(value: Any, prefix: str) -> list[tuple[str, str]]:
        if isinstance(value, Mapping) and value:
            found = [pair for k, v in value.items() for pair in leaves(v, f"{prefix}.{k}" if prefix else str(k))]
            return [(k, v) for k, v in found if not k.endswith("_partial_")]  # how it is built, not what it is
        return [(prefix, text(value))]

    single = [(str(k), v) for k, v in record.items() if not isinstance(v, Mapping)]
    groups = [(str(k), leaves(v, "")) for k, v in record.items() if isinstance(v, Mapping) and v]
    return ([("", [pair for k, v in single for pair in leaves(v, k)])] if single else []) + groups
