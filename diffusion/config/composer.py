"""Composing a configuration from config files and overrides, without Hydra's global state: any thread may do it.

    composed = compose("sample", ["checkpoint=runs/digits", "out=samples"])
    with searching(["my_conf"]):                                     config folders beside conf/
        compose("train", ["model=mine"])

Config files are looked up in conf/ first, then in the folders of `searching`, then in those of the override
`hydra.searchpath`. Needs neither torch nor lightning.
"""

import functools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.core.utils import setup_globals
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict

from diffusion.errors import Refusal

PACKAGE = Path(__file__).resolve().parents[1]

_folders: ContextVar[tuple[str, ...]] = ContextVar("folders", default=())
_first = threading.Lock()  # Hydra registers its plugins and resolvers when they are first asked for


def conf_dir() -> Path:
    """Return the folder of our config files: inside the package in a wheel, beside it in a checkout."""
    for folder in (PACKAGE / "conf", PACKAGE.parent / "conf"):
        if folder.is_dir():
            return folder
    raise Refusal(f"No conf/ inside or beside {PACKAGE}: the installation is incomplete, install it again.")


@contextmanager
def searching(folders: Sequence[str]) -> Iterator[None]:
    """Also look for config files in these folders, in this thread, until the context ends.

    Args:
        folders: paths, or the addresses that `hydra.searchpath` takes, as `pkg://mine.conf`.

    Raises:
        Refusal: a folder does not exist.
    """
    for folder in folders:
        path = folder.removeprefix("file://")
        if "://" not in path and not Path(path).is_dir():
            raise Refusal(
                f"{folder}: config folder not found. Give the path of a folder that holds model/, sampler/, …"
            )
    found = [folder if "://" in folder else str(Path(folder).absolute()) for folder in folders]
    token = _folders.set(tuple(dict.fromkeys([*_folders.get(), *found])))
    try:
        yield
    finally:
        _folders.reset(token)


def searched() -> tuple[str, ...]:
    """Return the config folders beside conf/ that this thread looks in."""
    return _folders.get()


def _loader() -> ConfigLoaderImpl:
    return _loader_of(_folders.get())


@functools.cache
def _loader_of(folders: tuple[str, ...]) -> ConfigLoaderImpl:
    with _first:
        setup_globals()
        Plugins.instance()
    path = ConfigSearchPathImpl()
    path.append("hydra", "pkg://hydra.conf")
    path.append("main", f"file://{conf_dir()}")
    for folder in folders:
        path.append("command-line", folder if "://" in folder else f"file://{folder}")
    path.append("schema", "structured://")
    return ConfigLoaderImpl(path)


def compose(config_name: str | None, overrides: Sequence[str], hydra: bool = False) -> DictConfig:
    """Compose a configuration; interpolations are kept.

    Args:
        config_name: a file of conf/ without its ending; None composes the overrides alone.
        overrides: in Hydra's grammar. hydra: keep the group `hydra`, which holds Hydra's own settings.

    Raises:
        HydraException: an override cannot be read, or an option does not exist.
    """
    cfg = _loader().load_configuration(config_name, list(overrides), RunMode.RUN, from_shell=False)
    if not hydra:
        with open_dict(cfg):
            del cfg["hydra"]
    return cfg


def groups() -> dict[str, list[str]]:
    """Return the config groups and their options; files that begin with an underscore are parts of options."""
    repository = _loader().repository
    found = {}
    for name in repository.get_group_options("", ObjectType.GROUP):
        if name != "hydra" and not name.startswith("_"):
            options = repository.get_group_options(name, ObjectType.CONFIG)
            found[name] = sorted({option for option in options if not option.startswith("_")})
    return dict(sorted(found.items()))


def option(group: str, name: str) -> DictConfig:
    """Return an option of a config group as it stands in its config file, with what that one is based on."""
    return compose(None, [f"+{group}={name}"])[group]


def our_options(group: str) -> list[str]:
    """Return the options of a group that stand in our own conf/."""
    return sorted(file.stem for file in (conf_dir() / group).glob("*.yaml") if file.name[0] != "_")
