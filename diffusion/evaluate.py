"""Score a trained model, or images, against real images: FID, Inception score, KID, precision, recall, bits/dim.

    python -m diffusion.evaluate checkpoint=runs/digits num_images=2000 guidance=classifier_free
    python -m diffusion.evaluate checkpoint=runs/digits 'metrics=[bits_per_dim]' likelihood.num_images=200
    python -m diffusion.evaluate checkpoint=runs/cifar10 task=sweep sampler.spacing=quadratic
    python -m diffusion.evaluate images=samples/digits reference=data/digits extractor=digits
    python -m diffusion.evaluate images=a.zip reference=b.npz 'metrics=[fid,kid,precision,recall]' out=scores.jsonl

A set of images is a folder, a .zip, .tar or .npz file, or a data set of shards. The images of a model depend only on
the seed and their numbers: one GPU, all GPUs of a machine, torchrun and srun give the same scores. If it is
interrupted, the same command continues with the images that it has. Results are printed, added to results.jsonl of the
run (or to out=FILE) with all settings that they depend on, and shown in the published tables that they belong to.

task=sweep measures FID for each of sweep.num_steps and sweep.eta, and writes sweep.csv and sweep.png.
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from diffusion.distributed.signals import install

    install()

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from diffusion.build.take import take
from diffusion.command import command, refusing
from diffusion.config.check import check, refuse_blocked, refuse_overwriting
from diffusion.config.effect import typed
from diffusion.config.metrics import names
from diffusion.data.shards.remote import is_remote
from diffusion.distributed.launcher import Compute
from diffusion.distributed.signals import handled
from diffusion.errors import Refusal
from diffusion.files import obstacle, writing
from diffusion.runs.folder import RunFolder
from diffusion.runs.results import Results, lock_beside

if TYPE_CHECKING:
    from diffusion.scoring.against import Output

TASKS = ("score", "sweep")
SWEEP = ("sweep.csv", ".sweep.csv.lock", "sweep.png")  # files of a sweep


@command("evaluate")
def main(cfg: DictConfig) -> None:
    with handled() as signals, refusing(cfg.debug):
        check(cfg, typed())
        check_paths(cfg)
        compute = take(cfg.trainer, Compute)
        compute.check()
        from diffusion.build.evaluation import comparison, evaluation
        from diffusion.distributed.place import Place
        from diffusion.distributed.processes import share
        from diffusion.page import write_report

        if cfg.checkpoint is None:
            made, place = comparison(cfg), Place.of(compute)
        else:
            made = evaluation(cfg)
            place = made.place
        rooms = made.rooms()
        for room in rooms:
            room.check()
        if compute.main:
            print(made.introduction(), flush=True)

        def work(ranks, where):
            with writing(*rooms):
                if cfg.checkpoint is None:
                    if rows := made.rows(ranks, where):
                        tell(rows)
                        add(rows, made.output)
                    return
                with made:
                    if cfg.task == "sweep":
                        path, rows = made.points(ranks, where)
                        if ranks.main:
                            tell_sweep(path, rows)
                        return
                    rows = made.rows(ranks, where)
                    if ranks.main:
                        tell(rows, made.model.record)
                        made.write_samples()
                        add(rows, made.output)
                        made.kept()
                        if made.output.file is None:
                            print(f"Report: {write_report(RunFolder(made.output.run))}")

        share(compute, place, work, signals, cfg.debug)


def check_paths(cfg: DictConfig) -> None:
    """Refuse what is not there, and sets of images that do not make a pair."""
    if not cfg.metrics:
        raise Refusal(f"metrics=[] measures nothing: give some of {', '.join(names())}.")
    if (cfg.checkpoint is None) == (cfg.images is None):
        raise Refusal("Give either checkpoint=PATH (a run folder or a .ckpt) or images=PATH with reference=PATH.")
    if cfg.images is not None and cfg.reference is None:
        raise Refusal(f"images={cfg.images} needs reference=PATH: a data set, a folder of pictures or an .npz.")
    if cfg.images is not None and cfg.samples is not None:
        raise Refusal(f"samples={cfg.samples}: with images={cfg.images} nothing is sampled.")
    if cfg.overwrite and cfg.samples is None:
        raise Refusal("overwrite=true is for samples=FOLDER, which is not given.")
    if cfg.per_class and "fid" not in cfg.metrics:
        raise Refusal(f"per_class=true needs fid in metrics; metrics=[{','.join(cfg.metrics)}] does not contain it.")
    if cfg.task == "sweep" and cfg.checkpoint is None:
        raise Refusal("task=sweep needs checkpoint=PATH (a run folder or a .ckpt).")
    if cfg.task == "sweep" and cfg.samples is not None:
        raise Refusal(f"samples={cfg.samples}: of a sweep no samples are kept.")
    for key in ("checkpoint", "images", "reference"):
        if cfg[key] is not None and not is_remote(cfg[key]) and not Path(cfg[key]).exists():
            raise Refusal(f"{key}={cfg[key]}: file or folder not found.")
    folder = cfg.task == "sweep"  # of sweep.csv and sweep.png
    if cfg.out is not None and Path(cfg.out).exists() and Path(cfg.out).is_dir() != folder:
        kind = ("a file: give a folder", "a folder: give a file, as " + f"{cfg.out}/results.jsonl")[not folder]
        raise Refusal(f"out={cfg.out} is {kind}.")
    if cfg.out is not None and (why := obstacle(Path(cfg.out) if folder else Path(cfg.out).parent)):
        raise Refusal(f"out={cfg.out}: {why}, so nothing can be kept there.")
    if cfg.samples is not None:
        refuse_overwriting("samples", Path(cfg.samples), cfg.overwrite)
    check_outputs(cfg)


def check_outputs(cfg: DictConfig) -> None:
    """Refuse a place where the results could not be kept once they are there."""
    run = run_of(cfg.checkpoint)
    if cfg.out is None and run is not None:
        files, folders = ["results.jsonl", ".results.lock", "report.html"], ["evaluations", "likelihood"]
        files += [f"evaluations/{name}" for name in SWEEP] if cfg.task == "sweep" else []
        refuse_blocked("checkpoint", run, files, folders, "out=FOLDER" if cfg.task == "sweep" else "out=FILE")
    elif cfg.out is not None and cfg.task == "sweep":
        refuse_blocked("out", Path(cfg.out), SWEEP, [])
    elif cfg.out is not None:
        path = Path(cfg.out)
        files = [path.name, lock_beside(path).name, f"{path.stem}_neighbours.png"]
        refuse_blocked("out", path.parent, files, ["likelihood"])
        try:
            path.read_text() if path.exists() else ""
        except (OSError, UnicodeDecodeError) as e:
            raise Refusal(f"out={path} is not a text file that results can be added to: give another one.") from e


def run_of(checkpoint: str | None) -> Path | None:
    """The run folder that a checkpoint lies in, None where it is in none."""
    if checkpoint is None:
        return None
    path = Path(checkpoint)
    if path.is_dir():
        return path
    return path.parent.parent if path.resolve().parent.name == "checkpoints" else None


def tell(rows: list[dict], record: Mapping[str, Any] | None = None) -> None:
    """Print the rows, also where they stand among published ones.

    Args:
        record: of the run of the model that they are about.
    """
    from diffusion.metrics.published import table_text
    from diffusion.page import with_model
    from diffusion.scoring.scores import describe

    for row in rows:
        print(describe(row))
    if text := table_text([with_model(row, record or {}) for row in rows]):
        print(f"\n{text}\n")


def add(rows: list[dict], output: "Output") -> None:
    """Add the rows to the file that is asked for, or to the results of the run."""
    if output.file is not None:
        Results.of_file(output.file, f"out={output.file}").add(rows)
        print(f"Results: {output.file}")
    else:
        folder = RunFolder(output.run)
        folder.add_results(rows)
        print(f"Results: {folder.results_path}")


def tell_sweep(path: Path, rows: list[dict]) -> None:
    """Print the table of a sweep, and draw it beside the published one."""
    from diffusion.page import sweep_figure, sweep_table_text

    print(sweep_table_text(rows))
    print(f"Sweep: {path}, {sweep_figure(rows, path.with_suffix('.png'))}")


if __name__ == "__main__":
    main()
