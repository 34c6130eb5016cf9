"""What the fields of a config file may hold: a wrong one is named before anything is computed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Kind:
    """`words` end the sentence "expected ..."; `holds` says whether a value is of this kind."""

    words: str
    holds: Callable[[Any], bool]


def _is_integer(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31


def _is_number(value: Any) -> bool:
    return REAL.holds(value) and math.isfinite(value)


def _are(holds: Callable[[Any], bool], value: Any, count: int | None = None) -> bool:
    """Whether `value` is a list of such, and of so many."""
    is_list = isinstance(value, (list, tuple)) and count in (None, len(value))
    return is_list and all(map(holds, value))


INTEGER = Kind("an integer", lambda x: isinstance(x, int) and not isinstance(x, bool))
INTEGER_OR_NONE = Kind("an integer or null", lambda x: x is None or INTEGER.holds(x))
COUNT = Kind("a positive integer", lambda x: _is_integer(x, 1))
INDEX = Kind("an integer of at least 0", lambda x: _is_integer(x, 0))
INDICES = Kind(
    "integers of at least 0", lambda x: x is None or INDEX.holds(x) or _are(INDEX.holds, x)
)
MAYBE_INDEX = Kind("an integer of at least 0 or null", lambda x: x is None or INDEX.holds(x))
THREE_INDICES = Kind("three integers of at least 0", lambda x: _are(INDEX.holds, x, 3))
REAL = Kind("a number", lambda x: isinstance(x, (int, float)) and not isinstance(x, bool))
NUMBER = Kind("a number", _is_number)  # a finite one
POSITIVE = Kind("a positive number", lambda x: _is_number(x) and x > 0)
NOT_NEGATIVE = Kind("a number of at least 0", lambda x: _is_number(x) and x >= 0)
FRACTION = Kind("a number of at least 0 and below 1", lambda x: _is_number(x) and 0 <= x < 1)
THREE_NUMBERS = Kind("three numbers", lambda x: _are(_is_number, x, 3))
THREE_POSITIVE = Kind("three positive numbers", lambda x: _are(POSITIVE.holds, x, 3))
FLAG = Kind("true or false", lambda x: isinstance(x, bool))
FLAG_OR_NEVER = Kind('True, False or "never"', lambda x: FLAG.holds(x) or x == "never")
TEXT = Kind("a string", lambda x: isinstance(x, str))
TEXTS = Kind(
    "a string or several, none empty",
    lambda x: bool(x) and (TEXT.holds(x) or _are(lambda y: TEXT.holds(y) and y != "", x)),
)
OBJECT = Kind("an object", lambda x: isinstance(x, dict))
FILE_NAMES = Kind(
    "an object of file names",
    lambda x: OBJECT.holds(x) and all(_is_file_name(name) for name in x.values()),
)

_BY_TYPE = {"int": COUNT, "float": POSITIVE, "bool": FLAG, "str": TEXT, "int | None": MAYBE_INDEX}


def expect(name: str, value: Any, kind: Kind) -> Any:
    """`value`; ValueError naming the field unless it is of this kind."""
    if not kind.holds(value):
        raise ValueError(f"{name}: expected {kind.words}, got {value!r:.80}")
    return value


def expect_fields(config: Any, prefix: str = "", /, **kinds: Kind) -> None:
    """ValueError unless every field of a dataclass is of the kind given, or else of its type's:
    int COUNT, float POSITIVE, bool FLAG, str TEXT. Fields of other types are not looked at."""
    for field in dataclasses.fields(config):
        kind = kinds.get(field.name) or _BY_TYPE.get(str(field.type))
        if kind is not None:
            expect(prefix + field.name, getattr(config, field.name), kind)


def known_fields(cls: type, raw: dict[str, Any]) -> dict[str, Any]:
    """What a JSON object says about the fields of a dataclass; null says nothing."""
    names = {f.name for f in dataclasses.fields(cls)}
    return {k: v for k, v in raw.items() if k in names and v is not None}


def expect_multiple(config: Any, prefix: str, name: str, by: str) -> None:
    """ValueError unless field `name` of a dataclass is a multiple of its field `by`."""
    value, divisor = getattr(config, name), getattr(config, by)
    if value % divisor:
        raise ValueError(f"{prefix}{name}: expected a multiple of {by} = {divisor}, got {value}")


class SquareImages:
    """Of the config of a tower that cuts square images into patches: image_size, patch_size."""

    image_size: int
    patch_size: int

    def expect_a_patch(self, prefix: str = "") -> None:
        """ValueError unless a patch fits into an image."""
        if self.image_size < self.patch_size:
            raise ValueError(
                f"{prefix}image_size: expected at least patch_size = {self.patch_size}, "
                f"got {self.image_size}"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along height and width."""
        return (self.image_size // self.patch_size,) * 2


def preset_of(presets: Mapping[str, T], name: str) -> T:
    """The published size of this name; ValueError that lists them all when there is none."""
    if name not in presets:
        raise ValueError(f"preset: expected one of {sorted(presets)}, got {name!r}")
    return presets[name]


def _is_file_name(name: Any) -> bool:
    """A plain one: a checkpoint may not send its reader to another directory."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


class AttentionHeads:
    """For a config with Hugging Face's fields: its heads under the names that the ops have."""

    hidden_size: int
    num_attention_heads: int

    @property
    def num_heads(self) -> int:
        return self.num_attention_heads

    @property
    def num_heads_k(self) -> int:
        return getattr(self, "num_key_value_heads", None) or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads
