"""A swap: an object gets a subclass of its own class, with another forward.

Nothing but the object's class changes: its parameters, hooks, name and place in the model are
those it had, `isinstance` holds, other objects of the class keep theirs, and the way back is the
class's base. Copies and pickles of the object are swapped as well.
"""

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from torch.nn import Module

_MARK = "_vlmkernels_swap"


def never(module: Module, name: str) -> str | None:
    return None


@dataclass(frozen=True)
class Swap:
    """One way to swap an object.

    Args:
        kind: the option of `patch_model` that it belongs to.
        body: from the object's class, what its subclass defines: forward and what that needs.
        why_not: from the object and its name in the model, why this one stays as it is, or None.
        reads: all names that the replaced forward mentions; checked where given, so that what
            transformers changes there is an error.
    """

    kind: str
    body: Callable[[type], dict[str, Any]]
    why_not: Callable[[Any, str], str | None] = never
    reads: frozenset[str] | None = None


def changed(what: str) -> RuntimeError:
    version = metadata.version("transformers")
    return RuntimeError(
        f"patch_model: transformers {version} is not one that this was written for: {what}; "
        "nothing was patched"
    )


@functools.cache
def subclass(cls: Any, swap: Swap) -> type:
    """cls with this swap: one class for all objects of cls.

    Raises:
        RuntimeError: the forward of cls is not the one that the swap was written for.
    """
    names = set(cls.forward.__code__.co_names)
    if swap.reads is not None and names != swap.reads:
        difference = sorted(names ^ swap.reads)
        raise changed(f"{cls.__name__}.forward differs from what it was in {difference}")
    like = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    body = {_MARK: swap, "__reduce_ex__": _reduce, **like, **swap.body(cls)}
    return type(cls.__name__, (cls,), body)


def original(cls: type) -> Any:
    while _MARK in vars(cls):
        (cls,) = cls.__bases__
    return cls


def swaps_of(cls: type) -> list[Swap]:
    return [vars(c)[_MARK] for c in reversed(cls.__mro__) if _MARK in vars(c)]


def rebound(cls: Any, **functions: Callable[..., Any]) -> dict[str, Any]:
    """forward of cls that finds these functions where it finds those of its module: the code and
    all else it does stay transformers' own."""
    forward = cls.forward
    missing = sorted(set(functions) - set(forward.__code__.co_names))
    if missing:
        raise changed(f"{cls.__name__}.forward no longer calls {missing}")
    scope = {k: v for k, v in forward.__globals__.items() if k != "__name__"} | functions
    code, defaults, cells = forward.__code__, forward.__defaults__, forward.__closure__
    new = types.FunctionType(code, scope, forward.__name__, defaults, cells)
    new.__kwdefaults__ = forward.__kwdefaults__
    return {"forward": new}


def _reduce(self: Module, protocol: int) -> tuple[Any, ...]:
    return _rebuild, (original(type(self)), tuple(swaps_of(type(self)))), self.__dict__


def _rebuild(cls: Any, swaps: tuple[Swap, ...]) -> Any:
    for swap in swaps:
        cls = subclass(cls, swap)
    return cls.__new__(cls)
