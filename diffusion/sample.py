"""Sample images from a trained model.

    python -m diffusion.sample checkpoint=runs/digits out=samples/digits
    python -m diffusion.sample checkpoint=runs/digits out=samples/sevens num_images=64 'labels=[7]' \\
        guidance=classifier_free guidance.scale=3 sampler=ancestral

The folder `out` gets grid.png and samples.npz (arr_0: images, uint8 NHWC; arr_1: labels), with png=true also a PNG file
for each image. Image k depends only on the seed and k, not on the number of processes. All GPUs of the machine are
used, or the processes that torchrun or srun has started.

If it is interrupted, the same command continues with the images that it has, also with another batch_size. If `out`
holds images of another sampling, the command is refused; overwrite=true replaces them.
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from diffusion.distributed.signals import install

    install()

from pathlib import Path

from omegaconf import DictConfig

from diffusion.build.take import take
from diffusion.command import command, refusing
from diffusion.config.check import check, check_guidance, refuse_overwriting
from diffusion.config.effect import typed
from diffusion.distributed.launcher import Compute
from diffusion.distributed.signals import handled
from diffusion.errors import Refusal
from diffusion.files import Room, writing


@command("sample")
def main(cfg: DictConfig) -> None:
    with handled() as signals, refusing(cfg.debug):
        check(cfg, typed())
        out = Path(cfg.out)
        check_paths(cfg, out)
        compute = take(cfg.trainer, Compute)
        compute.check()
        from diffusion.build import door
        from diffusion.build.sampling import recipe
        from diffusion.distributed.place import Place
        from diffusion.distributed.processes import share
        from diffusion.distributed.ranks import Ranks
        from diffusion.scoring.gallery import Gallery
        from diffusion.scoring.sampling import steps_in_words

        place = Place.of(compute)
        model = door.trained(cfg.checkpoint, cfg.ema, cfg.trust)
        if model.image_shape[0] not in (1, 3):
            raise Refusal(f"checkpoint={cfg.checkpoint} is a model of points, of which there are no pictures.")
        check_guidance(cfg.guidance.scale, model.num_classes, model.facts.label_dropout)
        chosen, about = recipe(cfg, cfg.batch_size, cfg.labels), {**model.identity(), "step": model.step}

        def gallery(where, ranks):
            sampling = chosen.sampling(model.denoiser, where, model.image_shape, ranks.attend)
            return Gallery(out / ".batches", sampling, cfg.num_images, about, ranks, f"out={out}", cfg.overwrite)

        planned = gallery(place, Ranks())
        planned.pieces.refuse_other()
        room = Room("out", out, planned.needs() + planned.written(cfg.png), f"{cfg.num_images:,} images")
        room.check()
        if compute.main:
            taken = planned.sampling
            print(
                f"Sampling {cfg.num_images} images with {taken.about['sampler']}, {steps_in_words(taken.record())}, "
                f"from {model.path} (step {model.step}, {model.weights} weights)",
                flush=True,
            )

        def work(ranks, where):
            model.denoiser.network.to(where.device, memory_format=where.memory_format)
            with writing(room), gallery(where, ranks) as images:
                images.make()
                if ranks.main:
                    shape = images.write(out, cfg.grid_images, cfg.png)
                    images.remove()
                    print(f"{out / 'grid.png'}\n{out / 'samples.npz'}: arr_0 uint8 {shape}")

        share(compute, place, work, signals, cfg.debug)


def check_paths(cfg: DictConfig, out: Path) -> None:
    """Refuse a checkpoint that is not there, and a folder in which something would be overwritten."""
    refuse_overwriting("out", out, cfg.overwrite)
    if not Path(cfg.checkpoint).exists():
        raise Refusal(f"checkpoint={cfg.checkpoint} does not exist. Give a run folder or a .ckpt file.")


if __name__ == "__main__":
    main()
