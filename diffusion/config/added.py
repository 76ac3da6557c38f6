"""What a user adds to a training run by Hydra's `+`: callbacks, loggers, and arguments of Lightning's Trainer.

    +callbacks.mine._target_=mine.Callback +callbacks.mine.every=10      a callback, with its arguments
    +logger.board._target_=pytorch_lightning.loggers.TensorBoardLogger   a logger beside the others
    +trainer.profiler=simple                                             an argument of pytorch_lightning.Trainer

Needs neither torch nor lightning.
"""

from collections.abc import Iterator

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from diffusion.config.declared import arguments
from diffusion.config.words import nearest
from diffusion.errors import Refusal

NAMED = ("callbacks", "logger")  # groups that hold further parts, each under a name of the user's
OUR_PARTS = (("callbacks", "grid"), ("callbacks", "score"))
OUR_TRAINER = ("diffusion.distributed.launcher.Compute", "diffusion.training.fit.Length")  # take the group's settings
TRAINER = "pytorch_lightning.trainer.trainer.Trainer"
DECIDED = {  # arguments of Lightning's Trainer that this program decides -> what to give instead
    "strategy": "trainer.devices and trainer.num_nodes decide it",
    "logger": "give +logger.NAME._target_=module.Class",
    "callbacks": "give +callbacks.NAME._target_=module.Class",
    "max_epochs": "give trainer.max_steps",
    "min_epochs": "give trainer.max_steps",
    "min_steps": "give trainer.max_steps",
    "max_time": "give trainer.max_steps",
    "fast_dev_run": "give trainer.max_steps=1",
    "overfit_batches": "an epoch is the whole data set",
    "limit_train_batches": "give trainer.max_steps",
    "limit_val_batches": "give held_out.num_images",
    "limit_test_batches": "nothing is tested by Lightning",
    "limit_predict_batches": "nothing is predicted by Lightning",
    "val_check_interval": "give held_out.every_steps",
    "check_val_every_n_epoch": "give held_out.every_steps",
    "num_sanity_val_steps": "give held_out.every_steps",
    "log_every_n_steps": "give log_every",
    "enable_checkpointing": "give save.every_steps",
    "enable_progress_bar": "the command shows its own",
    "accumulate_grad_batches": "give trainer.accumulate",
    "gradient_clip_val": "give optimizer.gradient_clip",
    "gradient_clip_algorithm": "give optimizer.gradient_clip",
    "deterministic": "give deterministic",
    "inference_mode": "nothing is evaluated by Lightning",
    "use_distributed_sampler": "the data module gives each process its samples",
    "plugins": "the writer of checkpoints is one",
    "default_root_dir": "give run_dir",
    "reload_dataloaders_every_n_epochs": "an epoch has no end",
    "barebones": "give callbacks=none",
}


def added_part(override: Override, reference: DictConfig) -> bool:
    """Return whether a word with `+` gives a part of the user's own, whose class judges its arguments.

    Args:
        reference: the configuration without the user's settings.

    Raises:
        Refusal: an argument of Lightning's Trainer that is unknown, or that this program decides.
    """
    group, _, name = override.key_or_group.partition(".")
    if not (override.is_add() and name) or "run_dir" not in reference:
        return False
    if group in NAMED:
        first, dot, _ = name.partition(".")
        return first not in reference[group] and (bool(dot) or isinstance(override.value(), dict))
    if group != "trainer" or name in reference.trainer:
        return False
    name = name.partition(".")[0]
    if name in DECIDED:
        raise Refusal(f"+trainer.{name} cannot be given: {DECIDED[name]}.")
    known = [argument for argument in arguments(TRAINER) or () if argument not in (*DECIDED, *reference.trainer)]
    if name not in known:
        raise Refusal(
            f"Unknown setting: trainer.{name}.{nearest(name, [*known, *map(str, reference.trainer)])} It can be a "
            f"setting of this group ({', '.join(map(str, reference.trainer))}) or, with +, an argument of Lightning's "
            f"Trainer ({', '.join(known)})."
        )
    return True


def added_parts(cfg: DictConfig, group: str) -> Iterator[tuple[str, DictConfig]]:
    """Yield the parts of one's own of a group, by name.

    Raises:
        Refusal: one has no `_target_`.
    """
    if "run_dir" not in cfg or group not in cfg:
        return
    for name, part in cfg[group].items():
        if not isinstance(part, DictConfig) or (group, name) in OUR_PARTS:
            continue
        if "_target_" not in part:
            ours = [inner for outer, inner in OUR_PARTS if outer == group]
            raise Refusal(
                f"{group}.{name} has no _target_.{nearest(str(name), ours)} To add a part of your own, give "
                f"+{group}.{name}._target_=module.Class."
            )
        yield str(name), part


def trainer_arguments(cfg: DictConfig) -> DictConfig:
    """Return the group of the arguments of Lightning's Trainer that were added."""
    known = arguments(TRAINER) or {}
    own = {k for owner in OUR_TRAINER for k in arguments(owner) or ()}
    return DictConfig({k: v for k, v in cfg.trainer.items() if k in known and k not in own})
