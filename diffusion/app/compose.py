"""From the words of a command line to a composed configuration, or to one clear message; without torch or lightning.

    @command("train")
    def main(cfg): ...

Hydra composes. Before it does, every word is looked at here, because Hydra's own answers speak of its grammar: an
unknown group, option, key or a value of another type is answered with what is allowed and the nearest name. Paths may
hold blanks, "=", commas and brackets. What is refused ends with exit status 2, without a traceback (one with
debug=true) and with nothing written. Values are judged in check.py.
"""

import ast
import difflib
import functools
import hashlib
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # exceptions come here instead of ending in Hydra's own report

import hydra  # noqa: E402
from hydra import compose, initialize_config_dir  # noqa: E402
from hydra.core.global_hydra import GlobalHydra  # noqa: E402
from hydra.core.hydra_config import HydraConfig  # noqa: E402
from hydra.core.override_parser.overrides_parser import OverridesParser  # noqa: E402
from hydra.core.override_parser.types import Override, QuotedString  # noqa: E402
from hydra.errors import HydraException  # noqa: E402
from hydra.types import RunMode  # noqa: E402
from omegaconf import DictConfig, ListConfig, OmegaConf  # noqa: E402
from omegaconf.errors import OmegaConfBaseException  # noqa: E402

PACKAGE = Path(__file__).resolve().parents[1]
PATH_KEYS = ("checkpoint", "image", "images", "mask", "source", "out", "run_dir", "other", "runs", "reference")
PATH_KEYS += ("samples", "data.root", "data.remote.folder", "extractor.weights")
PATH_KEYS += ("loader.root", "loader.cifar_root", "loader.peers_python", "other")
MAY_BE_NULL = ("sampler.num_steps", "logger.project")
MAY_BE_NULL += ("callbacks.score.during.num_images", "callbacks.score.during.num_steps")
FLAGS_WITH_VALUE = ("-c", "--cfg", "-cn", "--config-name", "-cp", "--config-path", "-cd", "--config-dir", "-p")
FLAGS_WITH_VALUE += ("--package",)


class Refusal(ValueError):
    """What a user asked for cannot be done as asked; the message says which key, what is allowed, and the cure."""


def conf_dir() -> Path:
    """The configs: inside the package in a wheel, beside it in a checkout."""
    for folder in (PACKAGE / "conf", PACKAGE.parent / "conf"):
        if folder.is_dir():
            return folder
    raise Refusal(f"No conf/ inside or beside {PACKAGE}: the installation is incomplete, install it again.")


def groups() -> dict[str, list[str]]:
    """Config groups and their options, by listing conf/."""
    found = sorted(p for p in conf_dir().iterdir() if p.is_dir() and not p.name.startswith("_"))
    return {p.name: sorted(f.stem for f in p.glob("*.yaml")) for p in found}


def nearest(word: str, allowed: list[str]) -> str:
    """' Did you mean ...?' where a name is near enough, else nothing."""
    for name in difflib.get_close_matches(word, allowed, n=1, cutoff=0.6):
        return f" Did you mean {name}?"
    return ""


# ---- words ----


def quote_path(word: str) -> str:
    """`out=a b,[c]=d` -> `out='a b,[c]=d'`: the value of a path key is taken as it stands, whatever it holds."""
    key, equals, value = word.partition("=")
    if not equals or key.lstrip("+") not in PATH_KEYS or value in ("", "null"):
        return word
    if value.startswith("${") or (len(value) > 1 and value[0] == value[-1] and value[0] in "'\""):
        return word
    return f"{key}={quoted(value)}"


def quoted(value: str) -> str:
    """A text, whatever it holds, as Hydra's grammar writes it."""
    escaped = re.sub(r"(\\*)'", lambda m: m[1] * 2 + r"\'", value).replace("${", r"\${")
    trailing = len(escaped) - len(escaped.rstrip("\\"))
    return f"'{escaped}{chr(92) * trailing}'"


def split_words(argv: list[str]) -> tuple[list[str], list[str]]:
    """(flags of Hydra with their values, overrides)."""
    flags, words, takes_value = [], [], False
    for word in argv:
        if takes_value or (word.startswith("-") and "=" not in word.split()[0]) or word.startswith("--"):
            flags.append(word)
            takes_value = word in FLAGS_WITH_VALUE
        else:
            words.append(word)
    return flags, words


def parse(word: str) -> Override:
    if "=" not in word and not word.startswith("~"):
        hint = f" Did you mean +experiment={word}?" if word in groups()["experiment"] else ""
        raise Refusal(f"{word!r} is no setting: settings are key=value.{hint}")
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException as e:
        raise Refusal(
            f"{word!r} cannot be read ({str(e).splitlines()[0]}). "
            f"Put the value in quotes: {word.partition('=')[0]}=\"'...'\""
        ) from e


def plain(value: object) -> object:
    """A parsed value without Hydra's quoting."""
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [plain(v) for v in value]
    return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value


def check_group(override: Override, known: dict[str, list[str]]) -> str:
    """Refuse an option that its group does not have; the word with which the reference is composed."""
    group = override.key_or_group
    if override.is_sweep_override():
        options = [str(plain(v)) for v in override.sweep_iterator()]
    else:
        options = [str(plain(override.value()))]
    for option in options:
        if option not in known[group]:
            raise Refusal(
                f"{group}={option}: there is no such {group}.{nearest(option, known[group])} "
                f"There are: {', '.join(known[group])}."
            )
    plus = "+" if group == "experiment" else ""
    return f"{plus}{group}={options[0]}"


# ---- keys and types, against the configuration without the user's values ----


def signature(target: str) -> list[str] | None:
    """Parameter names of a class or function of this package, read from its source; None for anything else."""
    module, _, name = target.rpartition(".")
    path = PACKAGE.parent / (module.replace(".", "/") + ".py")
    if not module.startswith("diffusion.") or not path.is_file():
        return None
    for node in ast.parse(path.read_text()).body:
        if getattr(node, "name", None) == name:
            if isinstance(node, ast.ClassDef):
                inits = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
                if not inits:
                    return None
                node = inits[0]
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            return [a.arg for a in arguments if a.arg != "self"]
    return None


def lookup(cfg: DictConfig, key: str) -> tuple[DictConfig, str, bool]:
    """(parent node, last name, whether it is there); refuses a path that leads through what is no group of keys."""
    node, names = cfg, key.split(".")
    for i, name in enumerate(names[:-1]):
        child = node._get_node(name, validate_access=False) if isinstance(node, DictConfig) else None
        if not isinstance(child, DictConfig):
            raise Refusal(unknown(".".join(names[: i + 1]), node, name))
        if child._is_none() or child._is_missing():
            raise Refusal(f"{key}: {'.'.join(names[: i + 1])} is switched off (null) by the chosen options.")
        node = child
    return node, names[-1], node._get_node(names[-1], validate_access=False) is not None


def unknown(key: str, parent: DictConfig, name: str) -> str:
    allowed = [str(k) for k in parent.keys() if not str(k).startswith("_") and k != "hydra"]
    where = key.rpartition(".")[0]
    listed = f"{where} has" if where else "There are"
    hint = nearest(name, allowed).replace("mean ", f"mean {where}." if where else "mean ")
    return f"{key} is no setting of this command.{hint} {listed}: {', '.join(allowed)}."


def kind(value: object) -> str:
    names = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
    if isinstance(value, (list, ListConfig)):
        return "a list, as [1,2]"
    if isinstance(value, (dict, DictConfig)):
        return "a group of keys"
    return names[type(value)]


def check_value(override: Override, reference: DictConfig) -> str | None:
    """Refuse an unknown key or a value of another type than the default's; a rewritten word where one is plain."""
    key = override.key_or_group
    parent, name, present = lookup(reference, key)
    if not present:
        target = parent.get("_target_") if isinstance(parent, DictConfig) else None
        allowed = signature(target) if target else None
        if override.is_add() and allowed is not None and name in allowed:
            return None
        if override.is_add() and target and allowed is None and not str(target).startswith("diffusion."):
            return None  # another package's: its own constructor judges when everything is built
        if override.is_add() and allowed is not None:
            raise Refusal(f"{key} is no argument of {target}.{nearest(name, allowed)} It has: {', '.join(allowed)}.")
        raise Refusal(unknown(key, parent, name))
    if override.is_delete() or override.is_sweep_override():
        return None
    default, value = OmegaConf.select(reference, key, throw_on_missing=False), plain(override.value())
    if isinstance(default, ListConfig) and value is not None and not isinstance(value, list | dict):
        word = override.input_line
        return None if str(value).startswith("${") else f"{word.partition('=')[0]}=[{word.partition('=')[2]}]"
    if value is None and default is not None and key not in MAY_BE_NULL:
        raise Refusal(f"{key}=null: a value is needed, {kind(default)}; the default is {key}={default}.")
    if default is None or value is None or str(value).startswith("${"):
        return None
    if isinstance(default, str) and isinstance(value, int | float) and not isinstance(value, bool):
        name, _, text = override.input_line.partition("=")  # trainer.precision=32
        return f"{name}='{text}'"
    if type(default) is int and type(value) is float and value.is_integer():
        return f"{override.input_line.partition('=')[0]}={int(value)}"
    same = {DictConfig: dict, ListConfig: list}.get(type(default), type(default))
    if type(value) is not same and not (same is float and type(value) is int):
        raise Refusal(f"{key}={value} is not {kind(default)}; the default is {key}={default}.")
    return None


def check_words(config_name: str, words: list[str], sweep: bool = False) -> list[str]:
    """Refuse what cannot be composed, by name; returns the words as Hydra shall see them.

    In a sweep a comma separates values, so paths are left as they are written.
    """
    known, chosen, settings = groups(), [], []
    words = list(words) if sweep else [quote_path(w) for w in words]
    for i, word in enumerate(list(words)):
        override = parse(word)
        name = override.key_or_group
        if name == "hydra/launcher":
            chosen.append(word)
        elif name.startswith("hydra.launcher."):
            settings.append((i, override))
        if name == "hydra" or name.startswith(("hydra.", "hydra/")):
            continue
        if name == "experiment":
            words[i] = "+" + word.lstrip("+")
            chosen.append(check_group(override, known))
            if override.is_sweep_override():  # of several names: there is no runs/NAME for what the sweep itself leaves
                words.append("hydra.sweep.dir=runs")
        elif name in known and not override.is_delete() and "_" != str(plain(override.value()))[:1]:
            chosen.append(check_group(override, known))
        else:
            settings.append((i, override))
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        try:
            reference = compose(config_name, overrides=chosen, return_hydra_config=True)
        except HydraException as e:
            group = next((w.partition("=")[0] for w in chosen if w.partition("=")[0] in str(e)), "")
            raise Refusal(f"{group or 'The configuration'}: {str(e).splitlines()[0]}") from e
    for i, override in settings:
        if override.key_or_group in {"+" + k for k in known}:
            continue
        words[i] = check_value(override, reference) or words[i]
    return words


def composed(config_name: str, words: list[str]) -> DictConfig:
    """What a command would be given for these words, resolved; refused as there. May be asked for within a command."""
    outer, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None  # Hydra composes for one at a time
    try:
        words = check_words(config_name, words)
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            cfg = compose(config_name, overrides=words)
    finally:
        GlobalHydra.instance().hydra = outer
    OmegaConf.resolve(cfg)
    return cfg


def sweep_folder(run_dir: str, words: list[str]) -> str:
    """The run folder of one job of a sweep: below the common one, named by its overrides, the same on every start."""
    own = sorted(w.lstrip("+") for w in words if not w.lstrip("+").startswith(("run_dir=", "experiment=")))
    slug = re.sub(r"[^\w.=,+-]+", "-", ",".join(own)) or "default"
    if len(slug.encode()) > 200:  # file systems take 255 bytes
        slug = f"{slug.encode()[:150].decode(errors='ignore')}-{hashlib.sha256(slug.encode()).hexdigest()[:12]}"
    return str(Path(run_dir) / slug)


# ---- commands ----


@contextmanager
def refusing(debug: bool = False) -> Iterator[None]:
    """A ValueError, or an error of Hydra's, while a command checks and builds: one message, exit status 2."""
    try:
        yield
    except (ValueError, OSError, HydraException, OmegaConfBaseException) as e:
        if debug:
            traceback.print_exc()
        cause = e.__cause__ if isinstance(e, HydraException) and isinstance(e.__cause__, ValueError) else e
        message = str(cause).strip()
        if not isinstance(cause, Refusal) and isinstance(cause, HydraException | OmegaConfBaseException):
            message = message.splitlines()[0]
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def help_text(config_name: str, doc: str) -> str:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        first = ["+experiment=digits"] if config_name == "train" else []
        cfg = compose(config_name, overrides=first)
    used = [g for g in groups() if g in cfg or g == "experiment" and config_name == "train"]
    lines = [f"  {('+' if g == 'experiment' else '') + g:12} {', '.join(groups()[g])}" for g in used]
    options = "\nGroups (group=option):\n" + "\n".join(lines) + "\n" if lines else ""
    settings = OmegaConf.to_yaml(cfg).replace("\n", "\n  ").rstrip()
    return f"{doc.strip()}\n{options}\nSettings (key.key=value) and what they are now:\n\n  {settings}\n"


def command(config_name: str, experiment: str | None = None) -> Callable:
    """Make `main(cfg)` a Hydra application over conf/<config_name>.yaml.

    `experiment` is what no `+experiment=` means. The module's docstring is the text of --help.
    """

    def decorate(main: Callable[[DictConfig], None]) -> Callable[[], None]:
        @functools.wraps(main)
        def run() -> None:
            flags, words = split_words(sys.argv[1:])
            doc = sys.modules[main.__module__].__doc__ or ""
            debug = any(w.replace(" ", "").lower() == "debug=true" for w in words)
            with refusing(debug):
                if "--help" in flags or "-h" in flags:
                    print(help_text(config_name, doc), end="")
                    return
                if experiment and not any(re.match(r"\+{0,2}experiment=", w) for w in words):
                    words.insert(0, f"+experiment={experiment}")
                sweep = "-m" in flags or "--multirun" in flags
                if sweep and config_name == "train":
                    from diffusion.app.sweep import sweep_words  # which composes in its turn

                    flags, words = sweep_words(flags, words)
                else:
                    words = check_words(config_name, words, sweep)
                sys.argv[1:] = [*flags, *words]
            application = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config_name)
            try:
                application(functools.partial(_task, main))()
            except (HydraException, OmegaConfBaseException) as e:  # raised by Hydra itself: _task lets none through
                with refusing(debug):
                    raise e

        return run

    return decorate


def _task(main: Callable[[DictConfig], None], cfg: DictConfig) -> None:
    with refusing(cfg.get("debug", False)):
        missing = sorted(OmegaConf.missing_keys(cfg) - {"hydra"})
        if missing:
            raise Refusal(f"{missing[0]} is needed: give {missing[0]}=...")
        if HydraConfig.get().mode == RunMode.MULTIRUN and "run_dir" in cfg:
            cfg.run_dir = sweep_folder(cfg.run_dir, list(HydraConfig.get().overrides.task))
        OmegaConf.resolve(cfg)
    OmegaConf.set_readonly(cfg, True)
    if not cfg.get("debug", False):
        warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # without the line of code it is from
    try:
        main(cfg)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
    except Exception:  # no refusal but a failure: the whole story, and a status of its own
        traceback.print_exc()
        sys.exit(1)
