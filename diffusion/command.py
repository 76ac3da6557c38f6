"""A command: `main(cfg)` as a Hydra application over conf/, and how it ends.

    @command("train")
    def main(cfg): ...

What is refused ends with exit status 2 and one message, without a traceback (one with debug=true) and with nothing
written; a failure with its traceback and exit status 1. Needs neither torch nor lightning.
"""

import functools
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # exceptions come here instead of ending in Hydra's own report

import hydra  # noqa: E402
from hydra.core.hydra_config import HydraConfig  # noqa: E402
from hydra.errors import HydraException  # noqa: E402
from hydra.types import RunMode  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402
from omegaconf.errors import OmegaConfBaseException  # noqa: E402

from diffusion.config.check import check  # noqa: E402
from diffusion.config.compose import Typed, check_words, composed, sweep_folder  # noqa: E402
from diffusion.config.composer import conf_dir, searching  # noqa: E402
from diffusion.config.effect import typed  # noqa: E402
from diffusion.config.values import fit_all  # noqa: E402
from diffusion.config.words import check_flags, config_folders, split_words  # noqa: E402
from diffusion.distributed.signals import end_if_interrupted, handled  # noqa: E402
from diffusion.errors import Refusal  # noqa: E402
from diffusion.files import reason, shortage  # noqa: E402

PLACEHOLDERS = {"out": "FOLDER", "checkpoint": "PATH", "task": "NAME", "name": "NAME", "data.name": "NAME"}
PLACEHOLDERS |= {"data.image_size": "PIXELS", "extractor.name": "NAME", "extractor.target": "package.module.function"}


CURE = re.compile(r"\b(?:[Gg]ive|brackets:|mean) ")  # begins what a message says to type
LIST = re.compile(r"(?<![\w.'\"+])(\+{0,2}[a-z][\w.]*=\[[^\s\]]*\])")


def for_a_shell(message: str) -> str:
    """Return a message with the lists that it says to type in quotes: zsh takes brackets for a pattern."""
    found = CURE.search(message)
    start = found.end() if found else len(message)
    return message[:start] + LIST.sub(r"'\1'", message[start:])


@contextmanager
def refusing(debug: bool = False) -> Iterator[None]:
    """A ValueError, or an error of Hydra's, while a command checks and builds: one message, exit status 2."""
    try:
        yield
    except (ValueError, OSError, HydraException, OmegaConfBaseException) as e:
        end_if_interrupted()
        if debug:
            traceback.print_exc()
        cause = e.__cause__ if isinstance(e, HydraException) and isinstance(e.__cause__, ValueError) else e
        message = shortage(e) or str(cause).strip() or reason(cause)
        if not isinstance(cause, Refusal) and isinstance(cause, HydraException | OmegaConfBaseException):
            key = getattr(cause, "full_key", None)
            message = (f"{key}: " if key else "") + message.splitlines()[0]
        print(f"error: {for_a_shell(message)}", file=sys.stderr)
        sys.exit(2)


def check_shown(command: str, words: list[str]) -> None:
    """Refuse to show a configuration that the command would refuse; one that lacks a setting is shown."""
    cfg = composed(command, words)
    if not OmegaConf.missing_keys(cfg):
        check(cfg, Typed(command, tuple(words)))


def command(config_name: str, experiment: str | None = None) -> Callable:
    """Make `main(cfg)` a Hydra application over conf/<config_name>.yaml.

    `experiment` is what no `+experiment=` means. The module's docstring is the text of --help.
    """

    def decorate(main: Callable[[DictConfig], None]) -> Callable[[], None]:
        @functools.wraps(main)
        def run() -> None:
            with handled() as signals:
                try:
                    called()
                except Exception:
                    end_if_interrupted()  # in code of others, which may have made another error of the signal's
                    raise
                finally:
                    signals.over()

        def called() -> None:
            if {"-sc", "--shell-completion"} & set(sys.argv[1:]):
                complete()
                return
            with ExitStack() as stack:
                with refusing():
                    folders, flags, words = config_folders(*split_words(sys.argv[1:]))
                    stack.enter_context(searching(folders))
                compose_and_run(flags, words)

        def complete() -> None:
            """Hydra's completion of a command line, and its installation in a shell."""
            hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config_name)(lambda cfg: None)()

        def compose_and_run(flags: list[str], words: list[str]) -> None:
            doc = sys.modules[main.__module__].__doc__ or ""
            debug = any(w.replace(" ", "").lower() == "debug=true" for w in words)
            with refusing(debug):
                if experiment and not any(re.match(r"\+{0,2}experiment=", w) for w in words):
                    words.insert(0, f"+experiment={experiment}")
                if "--help" in flags or "-h" in flags:
                    from diffusion.config.help import help_text

                    print(help_text(config_name, doc, words), end="")
                    return
                sweep = "-m" in flags or "--multirun" in flags
                if not (sweep and config_name == "train"):  # whose sweeps take flags of sbatch
                    check_flags(flags, sys.argv[1:])
                if sweep and config_name == "train":
                    from diffusion.config import sweep as sweeps  # which imports take seconds

                    flags, words = sweeps.sweep_words(flags, words)
                    check_flags(flags, sys.argv[1:])
                    if sweeps.ON_SLURM in words:
                        from diffusion.distributed import submission

                        submission.prepare(lambda overrides: sweeps.on_slurm(sweeps.run_of(overrides)))
                else:
                    words = check_words(config_name, words, sweep)
                if sweep and config_name != "train":
                    from diffusion.config.sweep import check_jobs

                    check_jobs(config_name, words)
                elif not sweep and {"-c", "--cfg"} & {flag.partition("=")[0] for flag in flags}:
                    check_shown(config_name, words)
                sys.argv[1:] = [*flags, *words]
            application = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config_name)
            try:
                application(functools.partial(_task, main))()
            except (
                HydraException,
                OmegaConfBaseException,
                ValueError,
            ) as e:  # of Hydra itself: _task lets none through
                with refusing(debug):
                    raise e

        return run

    return decorate


def _task(main: Callable[[DictConfig], None], cfg: DictConfig) -> None:
    with refusing(cfg.get("debug", False)):
        missing = sorted(OmegaConf.missing_keys(cfg) - {"hydra"})
        if missing:
            raise Refusal(f"Missing required setting: {missing[0]}={PLACEHOLDERS.get(missing[0], 'VALUE')}.")
        own = typed()
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            words = list(HydraConfig.get().overrides.task)
            if list(own.words) != words:
                cfg = composed(own.command, list(own.words))
            if "run_dir" in cfg:
                cfg.run_dir = sweep_folder(cfg.run_dir, words)
        OmegaConf.resolve(cfg)
        fit_all(cfg, own.command, own)
    OmegaConf.set_readonly(cfg, True)
    if not cfg.get("debug", False):
        warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # without the line of code it is from
    try:
        main(cfg)
    except Exception:  # no refusal but a failure: the whole story, and a status of its own
        end_if_interrupted()
        traceback.print_exc()
        sys.exit(1)
