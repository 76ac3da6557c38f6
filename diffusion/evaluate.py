"""Score a trained model, or images, against real ones: FID and Inception score from one extractor.

    python -m diffusion.evaluate checkpoint=runs/digits num_images=2000 guidance=classifier_free
    python -m diffusion.evaluate images=samples/digits/samples.npz reference=data/digits extractor=digits

Results are printed and added to results.jsonl of the run (or to out=FILE), each with all that it depends on.
"""

import json
from pathlib import Path

from omegaconf import DictConfig

from diffusion.app.check import check
from diffusion.app.compose import Refusal, command, refusing
from diffusion.files import write_atomically
from diffusion.training.run_folder import RunFolder


@command("evaluate")
def main(cfg: DictConfig) -> None:
    with refusing(cfg.debug):
        check(cfg)
        if (cfg.checkpoint is None) == (cfg.images is None):
            raise Refusal("Give either checkpoint=PATH (a run folder or a .ckpt) or images=PATH with reference=PATH.")
        if cfg.images is not None and cfg.reference is None:
            raise Refusal(f"images={cfg.images} needs reference=PATH: a data set, a folder of pictures or an .npz.")
        for key in ("checkpoint", "images", "reference"):
            if cfg[key] is not None and not Path(cfg[key]).exists():
                raise Refusal(f"{key}={cfg[key]}: there is no such file or folder.")
        if cfg.out is not None and Path(cfg.out).is_dir():
            raise Refusal(f"out={cfg.out} is a folder: give a file, as {cfg.out}/results.jsonl.")
        from diffusion.app.evaluation import Evaluation

        evaluation = Evaluation(cfg)
    print(evaluation.introduction(), flush=True)
    with refusing(cfg.debug):  # images can still turn out not to be what the extractor takes
        rows = evaluation.rows()
    from diffusion.training.scoring import describe

    for row in rows:
        print(describe(row))
    if cfg.out is not None:
        path = Path(cfg.out)
        old = path.read_text() if path.is_file() else ""
        write_atomically(path, old + "".join(json.dumps(row) + "\n" for row in rows))
        print(f"Results: {path}")
    elif evaluation.run_folder is not None:
        RunFolder(evaluation.run_folder).add_results(rows)
        print(f"Results: {RunFolder(evaluation.run_folder).results_path}")


if __name__ == "__main__":
    main()


