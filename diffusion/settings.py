"""What a setting may be: said once, by the annotations of the class or function that takes it.

    @settings("sampler")
    class DDIM(Sampler):
        def __init__(self, schedule: Schedule, eta: Annotated[float, Between(0, 1)] = 0.0) -> None: ...

`settings` checks the arguments at each call, in the words of the user's keys: ValueError("sampler.eta=2 is outside
[0, 1]."), and passes them on in the form of their kind: 3.0 as 3 where an integer is wanted. The configuration reads
the same annotations from the source (`config.declared`). Needs no torch.

The str of a range says what is wrong with a value outside it, and continues "KEY=VALUE "; its `words` say what is
allowed, for the text of --help.
"""

import dataclasses
import functools
import inspect
import math
import numbers
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from diffusion.errors import Refusal

# ---- ranges ----


@dataclass(frozen=True)
class AtLeast:
    """Numbers from `low` on."""

    low: float
    note: str = ""  # said after the range

    def fits(self, value: Any) -> bool:
        return value >= self.low

    def __str__(self) -> str:
        return f"must be at least {self.low}{self.note}"

    @property
    def words(self) -> str:
        return f"at least {self.low}"


@dataclass(frozen=True)
class Above:
    """Finite numbers above `low`."""

    low: float
    note: str = ""

    def fits(self, value: Any) -> bool:
        return self.low < value < math.inf

    def __str__(self) -> str:
        return f"must be above {self.low}{self.note}"

    @property
    def words(self) -> str:
        return f"above {self.low}"


@dataclass(frozen=True)
class Between:
    """Numbers of an interval; `ends` says which of its ends belong to it: "[]", "[)", "(]" or "()"."""

    low: float
    high: float
    note: str = ""
    ends: str = "[]"

    def fits(self, value: Any) -> bool:
        above = value >= self.low if self.ends[0] == "[" else value > self.low
        return bool(above and (value <= self.high if self.ends[1] == "]" else value < self.high))

    def __str__(self) -> str:
        return f"is outside {self._interval}{self.note}"

    @property
    def words(self) -> str:
        return f"in {self._interval}"

    @property
    def _interval(self) -> str:
        return f"{self.ends[0]}{self.low}, {self.high}{self.ends[1]}"


@dataclass(frozen=True)
class Multiple:
    """Positive multiples of `of`, from `least` on."""

    of: int
    note: str = ""
    least: int = 1

    def fits(self, value: Any) -> bool:
        return value >= self.least and value % self.of == 0

    def __str__(self) -> str:
        least = f", at least {self.least}" if self.least > self.of else ""
        return f"is not a positive multiple of {self.of}{least}{self.note}"

    @property
    def words(self) -> str:
        return f"a multiple of {self.of}"


@dataclass(frozen=True)
class Each:
    """Lists of which every member is in a range. words: what its members must be, as "numbers in [0, 1)"."""

    range: Any
    words: str

    def fits(self, value: Any) -> bool:
        return all(map(self.range.fits, value))

    def __str__(self) -> str:
        return f"must hold {self.words}"


@dataclass(frozen=True)
class Filled:
    """Lists that hold something. what: what is to be given."""

    what: str = "give at least one"

    def fits(self, value: Any) -> bool:
        return len(value) > 0

    def __str__(self) -> str:
        return f"is empty: {self.what}"

    @property
    def words(self) -> str:
        return "not empty"


@dataclass(frozen=True)
class Distinct:
    """Lists without a member that is there more than once."""

    def fits(self, value: Any) -> bool:
        return not any(member in value[:k] for k, member in enumerate(value))

    def why(self, value: Any) -> str:
        return f"has {next(m for k, m in enumerate(value) if m in value[:k])} more than once. Give it once"

    @property
    def words(self) -> str:
        return "no member twice"


@dataclass(frozen=True)
class Matching:
    """Words of a pattern. words: what they are not if they do not match."""

    pattern: str
    words: str

    def fits(self, value: Any) -> bool:
        return re.fullmatch(self.pattern, value) is not None

    def __str__(self) -> str:
        return f"must be a {self.words}"


Count = Annotated[int, AtLeast(1)]
Number = Annotated[int, AtLeast(0)]
Positive = Annotated[float, Above(0)]
Share = Annotated[float, Between(0, 1)]
Seed = Annotated[int, Between(0, 2**63 - 1)]


# ---- kinds ----


@dataclass(frozen=True)
class Kind:
    """What an annotation allows.

    Args:
        of: bool, int, float, str, list or dict; None: anything.
        null: whether None is allowed. allowed: single values, beside those of `of` if there are any.
        ranges: that the value must be in. member: kind of the members of a list. length: of a list, None: any.
        others: whether objects that no configuration can hold are allowed too, as functions.
    """

    of: type | None = None
    null: bool = False
    allowed: tuple[Any, ...] = ()
    ranges: tuple[Any, ...] = ()
    member: "Kind | None" = None
    length: int | None = None
    others: bool = False

    @property
    def words(self) -> str:
        """The kind for a message: "an integer", "one of small, large", "two numbers, as [0.9,0.99]"."""
        if self.allowed and self.of is None:
            return f"one of {', '.join(map(_plain, self.allowed))}"
        text = _list_words(self) if self.of is list else WORDS.get(self.of, "a value")
        return f"{', '.join(map(_plain, self.allowed))}, or {text}" if self.allowed else text

    def fitted(self, value: Any) -> Any:
        """The value as one of this kind, which a number may be written as in more than one way: 3.0 is an integer, 3 a
        number and a text, and a single value a list of one. The very object where nothing is to be changed.

        Raises:
            TypeError: it is of another kind.
        """
        if (
            self == ANY
            or self.others
            and not isinstance(value, bool | int | float | str | list | tuple | Mapping | None)
        ):
            return value
        if value is None and self.null or any(type(value) is type(one) and value == one for one in self.allowed):
            return value
        if self.of is None:  # one of a few words; another word is out of their range
            same = next((one for one in self.allowed if _plain(one) == _plain(value)), None)
            return same if same is not None else value if isinstance(value, str) else _fail()
        if self.of is list:
            return self._fitted_list(value)
        if self.of is str and isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        if self.of is int and isinstance(value, float) and value.is_integer():
            return int(value)
        if self.of in (int, float) and isinstance(value, bool):
            _fail()
        fits = {int: numbers.Integral, float: numbers.Real, dict: Mapping}.get(self.of, self.of)
        if not isinstance(value, fits) or self.of is float and not math.isfinite(value):
            _fail()
        return value

    def _fitted_list(self, value: Any) -> Any:
        if isinstance(value, Mapping | str) and (isinstance(value, Mapping) or self.member.of is not str):
            _fail()
        several = isinstance(value, Sequence) and not isinstance(value, str)
        members = list(value) if several else [value]
        if self.length not in (None, len(members)) or "" in members:
            _fail()
        fitted = [self.member.fitted(member) for member in members]
        if several and all(new is old for new, old in zip(fitted, members, strict=True)):
            return value
        return tuple(fitted) if isinstance(value, tuple) else fitted

    def outside(self, value: Any) -> str | None:
        """Why a value of this kind is not allowed, in a clause; None if it is."""
        if value is None or callable(value) or any(type(value) is type(one) and value == one for one in self.allowed):
            return None
        if self.allowed and self.of is None:
            return f"must be one of {', '.join(map(_plain, self.allowed))}"
        if self.of is list and self.member is not None:
            for member in value:
                if why := self.member.outside(member):
                    return f"holds {_plain(member)}, which {why}"
        broken = next((range_ for range_ in self.ranges if not range_.fits(value)), None)
        if broken is None:
            return None
        return broken.why(value) if hasattr(broken, "why") else str(broken)


ANY = Kind()
WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "text", dict: "a group of keys"}
MEMBERS = {int: "integers, as [1,2]", float: "numbers, as [1,2]", str: "words, as [a,b]"}


def _fail() -> typing.NoReturn:
    raise TypeError


def _plain(value: Any) -> str:
    return {None: "null", True: "true", False: "false"}.get(value, str(value)) if _simple(value) else str(value)


def _simple(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _list_words(kind: Kind) -> str:
    member = MEMBERS.get(kind.member.of) if kind.member is not None else None
    if kind.length is not None:
        return f"a list of {kind.length} {member or 'values'}"
    return f"a list of {member}" if member else "a list, as [1,2]"


def kind_of(annotation: Any) -> Kind:
    """What an annotation allows: of the types of settings, Literal, Annotated with ranges, lists, and None beside them.
    Of any other annotation, anything."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        kind = kind_of(arguments[0])
        ranges = tuple(range_ for range_ in arguments[1:] if hasattr(range_, "fits"))
        return dataclasses.replace(kind, ranges=(*ranges, *kind.ranges))
    if origin in (Union, types.UnionType):
        kinds = [kind_of(argument) for argument in arguments if argument is not type(None)]
        words = tuple(word for kind in kinds if kind.of is None for word in kind.allowed)
        if len(kinds) == 2 and kinds[0] == Kind(bool) and kinds[1].of is float:  # false, true, or a number
            return dataclasses.replace(kinds[1], allowed=(False, True))
        typed = [kind for kind in kinds if kind.of is not None]
        if len(typed) > 1 or not (typed or words):
            return ANY
        whole, null = typed[0] if typed else Kind(), type(None) in arguments
        return dataclasses.replace(whole, null=null, allowed=(*whole.allowed, *words), others=ANY in kinds)
    if origin is Literal:
        return Kind(allowed=arguments)
    if annotation in (bool, int, float, str):
        return Kind(annotation)
    if annotation in (dict, Mapping) or origin in (dict, Mapping):
        return Kind(dict)
    if annotation in (list, tuple) or origin in (list, tuple, Sequence, typing.Iterable):
        members = [argument for argument in arguments if argument is not Ellipsis]
        fixed = origin is tuple and Ellipsis not in arguments
        member = kind_of(members[0]) if members else ANY
        return Kind(list, member=member, length=len(members) if fixed else None)
    return ANY


# ---- at construction ----


def settings(group: str) -> Callable:
    """Check the arguments of a class or a function against its annotations at each call, and pass them on as `fitted`.

    Args:
        group: of the configuration: an argument is the user's setting `group.NAME`. "" for settings of no group.

    Raises:
        ValueError, when it is called: an argument is of another kind, or out of its range.
    """
    before = f"{group}." if group else ""

    def decorate(thing: Any) -> Any:
        made = thing.__init__ if isinstance(thing, type) else thing
        signature, hints = inspect.signature(made), {}

        @functools.wraps(made)
        def checked(*args: Any, **kwargs: Any) -> Any:
            if not hints:
                hints.update({n: kind_of(a) for n, a in typing.get_type_hints(made, include_extras=True).items()})
            bound = signature.bind(*args, **kwargs)
            for name, value in bound.arguments.items():
                if name != "self" and (kind := hints.get(name, ANY)) != ANY:
                    bound.arguments[name] = fitted(before + name, value, kind)
            return made(*bound.args, **bound.kwargs)

        if not isinstance(thing, type):
            return checked
        thing.__init__ = checked
        return thing

    return decorate


def fitted(key: str, value: Any, kind: Kind) -> Any:
    """The value as one of its kind. Refusal if it is of another kind, or out of its range."""
    try:
        found = kind.fitted(value)
    except TypeError:
        raise Refusal(f"{key}={_plain(value)} is not {kind.words}.") from None
    if why := kind.outside(found):
        raise Refusal(f"{key}={_plain(value)} {why}.")
    return found
