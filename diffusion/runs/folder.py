"""The folder of a run: its configuration, lock, checkpoints and results. Needs neither torch nor lightning.

    config.yaml  checkpoints/step_00001000.ckpt  checkpoints/last.ckpt
    metrics.csv  samples/step_00001000.png  results.jsonl  report.html

The same command finds the same folder again, so that no name contains a time. A run may be resumed with another
configuration only if the difference does not affect training. Any other difference is an error.
"""

import contextlib
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from diffusion.files import (
    LEFTOVER,
    locked,
    read_regular,
    reason,
    remove_leftovers,
    sha256_of,
    sync_folder,
    write_atomically,
)
from diffusion.models.resolutions import resolutions
from diffusion.notices import warn
from diffusion.runs.checkpoint_head import Head, read_head
from diffusion.runs.recorded import Recorded
from diffusion.runs.results import Results

# Settings that may change between two starts of a run, because they do not affect the trained weights.
MAY_DIFFER = (
    "trainer data.rule data.num_workers data.cache data.root data.remote data.prepare data.on_bad_sample "
    "data.max_bad_share model.activation_checkpointing on_nonfinite max_nonfinite logger save callbacks extractor "
    "held_out metrics sampler guidance paper debug fingerprint_every deterministic log_every run_dir"
).split()
ALIKE = (  # columns in which two FIDs must agree to be comparable
    "num_images", "sampler", "num_steps", "visits", "eta", "variance", "spacing", "rho", "clip_x0", "guidance_scale",
    "extractor_sha256", "split",
)  # fmt: skip
OF_ANOTHER_RUN = "it belongs to another run"
MOST_BYTES = 1 << 20  # largest config.yaml
LR_STEPS = "lr_schedule.num_steps"
RECORDED = ("data.lanes", "data.digest", LR_STEPS)  # may be null at the start; then determined and recorded


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings: {'a': {'b': 1}} -> {'a.b': 1}. Lists are values."""
    if not isinstance(values, Mapping) or not values:
        return {prefix: dict(values) if isinstance(values, Mapping) else values}
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat.update(flatten(value, f"{prefix}.{name}" if prefix else str(name)))
    return flat


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The settings that affect training and differ, each as 'key: was a, is b'.

    A setting in RECORDED that is null in one of the two has the value of the other.
    """
    old, new = _effective(flatten(old)), _effective(flatten(new))
    for key in RECORDED:
        if key in old | new and None in (new.get(key), old.get(key)):
            new[key] = old[key] = new.get(key) or old.get(key)
    found = []
    for key in sorted(old.keys() | new.keys()):
        free = any(key == k or key.startswith(k + ".") for k in MAY_DIFFER)
        if not free and old.get(key) != new.get(key):
            found.append(f"{key}: was {old.get(key)}, is {new.get(key)}")
    return found


def _effective(flat: dict[str, Any]) -> dict[str, Any]:
    """Flat settings without those that have no effect.

    These are attention resolutions that do not occur, which earlier versions accepted, and the scale of an embedding
    that is not used.
    """
    size, levels, asked = (flat.get(f"model.{name}") for name in ("image_size", "multipliers", "attention_resolutions"))
    if isinstance(size, int) and isinstance(levels, list) and isinstance(asked, list):
        there = resolutions(size, len(levels))
        flat["model.attention_resolutions"] = [resolution for resolution in there if resolution in asked]
    if flat.get("model.time_embedding") == "positional":
        flat.pop("model.fourier_scale", None)
    return flat


def damage(path: Path) -> str | None:
    """How a checkpoint file is damaged, as a clause, or None. Checks its .sha256 file if it has one, else its CRCs."""
    if not path.is_file():
        return "file not found"
    wanted = digest_beside(path)
    try:
        if wanted is not None:
            if sha256_of(path) != wanted:
                return "its sha256 differs from the one that was recorded when it was written"
            return None
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except Exception as e:  # each compression method has its own errors
        return f"it is truncated or not a checkpoint ({e})"
    return f"its record {broken} is damaged" if broken else None


def digest_beside(path: Path) -> str | None:
    """The sha256 that was recorded when a checkpoint was written; None if it is missing or damaged."""
    try:
        text = read_regular(path.with_suffix(".sha256"), 1000).decode("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return text if re.fullmatch("[0-9a-f]{64}", text) else None


def fault(
    path: Path,
    step: int | None = None,
    record: Recorded | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> str | None:
    """Why a checkpoint file cannot be used, as a clause, or None. Nothing in it is executed.

    Args:
        step: the step in its name; None means any.
        record: the configuration of the run that it must belong to; None means any.
        shapes: shapes of the weights of that run, by the names of `state_dict`; None means any.
    """
    wrong = damage(path)
    if wrong is not None and path.is_file() and digest_beside(path) is None:
        with contextlib.suppress(ValueError):  # report unsafe content rather than a damaged archive
            return _unsafe(read_head(path)) or wrong
    if wrong is not None:
        return wrong
    try:
        head = read_head(path)
    except ValueError as error:
        return str(error)
    if head.unsafe:
        return _unsafe(head)
    if step is not None and head.step != step:
        return f"it holds step {head.step}, not step {step}"
    if record is not None and (found := differences(head.config, record)):
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        return f"{OF_ANOTHER_RUN} ({found[0]}{more})"
    if shapes is not None and head.shapes != shapes:
        name = min(name for name in head.shapes.keys() | shapes.keys() if head.shapes.get(name) != shapes.get(name))
        return f"it holds another network: {name} has shape {head.shapes.get(name)}, expected {shapes.get(name)}"
    return None


def _unsafe(head: Head) -> str | None:
    if not head.unsafe:
        return None
    return f"it is unsafe: loading it would call {', '.join(head.unsafe[:5])}, which no valid checkpoint does"


class _Plain(yaml.SafeLoader):
    """A YAML loader without merge keys, with which a file of a few hundred bytes could use all memory."""

    def flatten_mapping(self, node: Any) -> None:
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.YAMLError("it has merge keys (<<), which are not allowed")


class OnError:
    """Context for writing a file that training does not need in order to continue.

    With the action "stop" an OSError is raised. With "warn" it is printed as a warning.
    """

    def __init__(self, action: str = "stop") -> None:
        self.action = action

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> bool:
        if not isinstance(error, OSError) or self.action == "stop":
            return False
        print(f"warning: {reason(error)} Training continues (save.on_error=warn).", file=sys.stderr, flush=True)
        return True


class RunFolder:
    """The folder of one run: its paths and rules. The constructor does not access the disk."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_path, self.metrics_path = self.path / "config.yaml", self.path / "metrics.csv"
        self.results_path, self.report_path = self.path / "results.jsonl", self.path / "report.html"
        self.checkpoints, self.samples = self.path / "checkpoints", self.path / "samples"
        self.evaluations = self.path / "evaluations"  # samples that are being scored, and images of evaluations
        self.last = self.checkpoints / "last.ckpt"
        self._results = Results(self.results_path, self._results_locked)
        self._config: Recorded | None = None  # from the newest valid checkpoint, if config.yaml cannot be used

    # ---- configuration ----

    def config(self) -> Recorded | None:
        """The resolved configuration of the run; None for a new folder.

        If config.yaml is damaged or missing, it is read from the newest valid checkpoint, with a warning.

        Raises:
            ValueError: config.yaml is damaged, and there is no valid checkpoint.
        """
        wrong = None
        if self.config_path.is_file():
            try:
                return self._read_config()
            except ValueError as error:
                wrong = str(error).removesuffix(".")
        elif not self.steps():
            return None
        if self._config is None:
            step, path, _ = self.latest_valid(any_run=True)
            if path is None:
                if wrong is None:
                    return None
                raise ValueError(
                    f"{wrong}, and there is no valid checkpoint from which the settings could be read. Restore the "
                    f"file, or use another folder."
                )
            self._config = read_head(path).config
            what = wrong or f"{self.config_path} is missing"
            warn(f"{what}. The settings are read from {path}.")
        return self._config

    def _read_config(self) -> Recorded:
        """Read config.yaml. Raises ValueError if it is damaged."""
        where = str(self.config_path)
        try:
            content = yaml.load(read_regular(self.config_path, MOST_BYTES), _Plain)
        except (yaml.YAMLError, UnicodeDecodeError, OSError, ValueError, RecursionError) as error:
            detail = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(f"{where} is damaged ({detail})") from error
        config = Recorded(content, where)
        if missing := self._lacks(config):
            raise ValueError(f"{where} is damaged ({missing} is missing, which the newest checkpoint has)")
        return config

    def _lacks(self, record: Recorded) -> str | None:
        """A setting that the newest checkpoint has and this configuration does not, or None.

        It detects a file that is truncated at the end of a line, which is still valid YAML.
        """
        for step in self.steps()[:1]:
            with contextlib.suppress(ValueError, OSError):
                recorded = read_head(self.checkpoint_path(step)).config
                return next(iter(sorted(flatten(recorded).keys() - flatten(record).keys())), None)
        return None

    def refuse_other(self, new: Recorded) -> None:
        """Check that the folder is new or belongs to a run with the same training settings.

        Raises:
            ValueError: the settings differ; the message lists them and names a free run_dir. Or the folder is not a run
                folder.
        """
        try:
            old = self.config()
            self.refuse_links()
        except ValueError as error:
            raise ValueError(f"run_dir={self.path}: {error}") from error
        if old is None:
            beside = self.path.iterdir() if self.path.is_dir() else ()
            # files of a sweep, whose runs are in subfolders
            sweep = (".lock", ".results.lock", "multirun.yaml", ".submitit")
            others = (p for p in beside if p.name not in sweep and not p.match(LEFTOVER))
            if any(not (p / "config.yaml").is_file() for p in others):
                raise ValueError(
                    f"run_dir={self.path} is not a run folder: it is not empty and has no config.yaml. Give another "
                    f"run_dir."
                )
            return
        found = differences(old, new)
        if found:
            free = next(p for i in range(2, 10_000) if not (p := Path(f"{self.path}_{i}")).exists())
            raise ValueError(
                f"run_dir={self.path} holds a run with another configuration:\n  " + "\n  ".join(found) + "\n"
                f"Use the original settings, or start a new run with run_dir={free}"
            )

    def refuse_links(self) -> None:
        """Check that no link leads out of the run folder, because files there would be written or removed.

        Raises:
            ValueError: a folder in the run folder, or in one of its subfolders, is a link to a folder outside; or a
                lock is not a regular file.
        """
        for lock in (self.path / ".lock", self.path / ".results.lock"):
            if lock.is_symlink() or (lock.exists() and not lock.is_file()):
                raise ValueError(f"{lock} is not a regular file, so it cannot be used as a lock. Remove it.")
        inside = self.path.resolve()
        try:
            first = list(os.scandir(self.path))
            entries = [*first, *(e for f in first if f.is_dir(follow_symlinks=False) for e in os.scandir(f.path))]
        except FileNotFoundError:
            return
        for entry in entries:
            if entry.is_symlink() and (goal := Path(entry.path).resolve()).is_dir() and not goal.is_relative_to(inside):
                raise ValueError(
                    f"{entry.path} is a link to {goal}, which is outside of the run folder. Replace it by a folder, or "
                    f"give another folder."
                )

    def write_config(self, record: Recorded) -> None:
        """Write config.yaml. A damaged config.yaml is kept as config.yaml.damaged."""
        if self.config_path.is_file():
            try:
                self._read_config()
            except ValueError:
                self.config_path.replace(self.config_path.with_suffix(".yaml.damaged"))
        write_atomically(self.config_path, yaml.safe_dump(record.plain(), sort_keys=False, allow_unicode=True))

    # ---- lock ----

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Context that locks the folder for this process. Raises ValueError if another process has locked it."""
        with locked(self.path / ".lock", f"run_dir={self.path}", "Wait for it, or give this run its own run_dir."):
            remove_leftovers(self.path)
            remove_leftovers(self.checkpoints)
            for digest in self.checkpoints.glob("step_*.sha256"):  # its checkpoint was not completed, or was removed
                if not digest.with_suffix(".ckpt").exists():
                    digest.unlink(missing_ok=True)
            yield

    # ---- checkpoints ----

    def checkpoint_path(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:08d}.ckpt"

    def steps(self) -> list[int]:
        """The steps that have a checkpoint file, newest first. The files may be damaged."""
        names = [path.name for path in self.checkpoints.glob("step_*.ckpt")] if self.checkpoints.is_dir() else ()
        found = [int(m[1]) for name in names if (m := re.fullmatch(r"step_([0-9]{8,18})\.ckpt", name))]
        return sorted((step for step in found if self.checkpoint_path(step).name in names), reverse=True)

    def latest_valid(
        self,
        record: Recorded | None = None,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        any_run: bool = False,
    ) -> tuple[int, Path | None, list[str]]:
        """The newest valid checkpoint of this run: its step, its path, and messages about newer ones that are not used.

        Step 0 and None if there is none.

        Args:
            record: configuration of the run; None means that of the folder.
            shapes: shapes of its weights; None means any.
            any_run: with record None, accept checkpoints of any run.
        """
        complaints = []
        if record is None and not any_run and self.config_path.is_file():
            with contextlib.suppress(ValueError):
                record = self._read_config()
        for step in self.steps():
            path = self.checkpoint_path(step)
            wrong = fault(path, step, record, shapes)
            if wrong is None:
                return step, path, complaints
            complaints.append(f"{path} is not used: {wrong}.")
        return 0, None, complaints

    def set_aside(self, step: int, why: str = "damaged") -> Path:
        """Rename a checkpoint that must not be used, so that it is not counted as a kept one. Returns the new path."""
        path = self.checkpoint_path(step)
        aside = path.rename(path.with_suffix(f".ckpt.{why}"))
        path.with_suffix(".sha256").unlink(missing_ok=True)
        return aside

    def point_to_what_is_left(self) -> None:
        """Remove links to checkpoints that were set aside, and point last.ckpt to the newest remaining one."""
        for link in (self.last, self.checkpoints / "best.ckpt"):
            if link.is_symlink() and not link.exists():
                link.unlink()
        if steps := self.steps():
            self.point_last_to(self.checkpoint_path(steps[0]))

    def point_last_to(self, path: Path) -> None:
        """Point last.ckpt to this path."""
        self._point(self.last, path)

    def point_best(self) -> int | None:
        """Point best.ckpt to the checkpoint of the lowest FID that the run has measured. Returns its step, or None.

        Only comparable FIDs are considered (ALIKE).
        """
        alike: dict[tuple, list[tuple[float, int]]] = {}
        for row in self.results():
            if row.get("by") == "train" and row.get("name") == "fid" and row.get("step") is not None:
                how = tuple(str(row.get(key)) for key in ALIKE)
                alike.setdefault(how, []).append((row["value"], row["step"]))
        steps = set(self.steps())
        most = max(alike.values(), key=lambda pairs: (len(pairs), pairs[-1][1]), default=[])
        step = min((pair for pair in most if pair[1] in steps), default=(None, None))[1]
        if step is not None:
            self._point(self.checkpoints / "best.ckpt", self.checkpoint_path(step))
        return step

    def _point(self, link: Path, path: Path) -> None:
        """Point a link to a path in the same folder, atomically. Without support for links, make a copy."""
        if link.is_symlink() and os.readlink(link) == path.name:
            return
        temporary = link.with_name(f".{link.name}.tmp")
        temporary.unlink(missing_ok=True)
        try:
            os.symlink(path.name, temporary)
        except OSError:
            write_atomically(link, path.read_bytes())
            return
        os.replace(temporary, link)
        sync_folder(self.checkpoints)

    def finished(self, record: Recorded, max_steps: int, metrics: set[str] | None) -> int:
        """The step of the last checkpoint if training, samples, scores and report are complete; otherwise 0.

        Args:
            metrics: names of the metrics; None means that the run is neither sampled nor scored.
        """
        if not self.steps() or self.steps()[0] < max_steps:
            return 0
        step, _, _ = self.latest_valid(record)
        looked = metrics is None or (self.samples / f"step_{step:08d}.png").is_file()
        done = looked and (metrics or set()) <= self.own_scores(step) and self.report_path.is_file()
        return step if step >= max_steps and done else 0

    # ---- results ----

    def results(self) -> list[dict]:
        """The results in results.jsonl. Invalid lines are ignored, with one warning."""
        return self._results.rows()

    def add_results(self, rows: list[dict]) -> None:
        """Add results to results.jsonl, atomically."""
        self._results.add(rows)

    def cut_results_after(self, step: int) -> None:
        """Remove the run's own scores of later steps, which will be trained again."""
        self._results.remove(lambda row: row.get("by") == "train" and (row.get("step") or 0) > step)

    def cut_evaluations_after(self, step: int) -> None:
        """Remove the samples of later steps, which will be trained again."""
        for path in self.evaluations.iterdir() if self.evaluations.is_dir() else ():
            found = re.fullmatch(r"(?:grid|score)_(\d+)(?:_final)?(?:\.lock)?", path.name)
            if found and int(found[1]) > step:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def own_scores(self, step: int) -> set[str]:
        """Names of the metrics that the run itself, not `evaluate`, has measured at this step."""
        return {r.get("name") for r in self.results() if r.get("by") == "train" and r.get("step") == step}

    @contextmanager
    def _results_locked(self) -> Iterator[None]:
        """Context that locks results.jsonl, which `evaluate` may also write while the run trains."""
        with locked(self.path / ".results.lock", f"run_dir={self.path}", wait=True):
            yield
