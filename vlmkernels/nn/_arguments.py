"""What modules check that look at their arguments before an op does."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast, get_type_hints

from torch import Tensor

from vlmkernels.ops._library import fits

Init = TypeVar("Init", bound=Callable[..., None])


def typed(init: Init) -> Init:
    """For an __init__: TypeError naming module and argument where a type hint does not hold.

    Without it a flag could be anything, and a wrong number would be an error of the first call.
    """
    signature, hints = inspect.signature(init), get_type_hints(init)
    ours = hints.keys() - {"device", "dtype", "return"}  # those torch checks

    @functools.wraps(init)
    def checked(self: object, *args: Any, **kwargs: Any) -> None:
        try:
            arguments = signature.bind(self, *args, **kwargs).arguments
        except TypeError:  # too many or too few: the call says so
            arguments = {}
        for name, value in arguments.items():
            if name in ours and not fits(value, hints[name]):
                where = f"{type(self).__name__}: {name}"
                kind = inspect.formatannotation(hints[name])
                raise TypeError(f"{where} must be of type {kind}, got {value!r:.80}")
        init(self, *args, **kwargs)

    return cast(Init, checked)


def expect_tensors(module: object, **arguments: object) -> None:
    """TypeError naming module and argument unless all are floating-point tensors."""
    for name, value in arguments.items():
        where = f"{type(module).__name__}: {name}"
        if not isinstance(value, Tensor):
            raise TypeError(f"{where} must be a torch.Tensor, got {type(value).__name__}")
        if not value.is_floating_point():
            raise TypeError(f"{where} must be floating point, got {value.dtype}")


def expect_positive(module: object, **arguments: int) -> None:
    """ValueError naming module and argument unless all are above 0."""
    for name, value in arguments.items():
        if value < 1:
            raise ValueError(f"{type(module).__name__}: {name} must be positive, got {value}")


def expect_width(module: object, width: int, **arguments: object) -> None:
    """`expect_tensors`, and ValueError unless their last dimension has `width` elements."""
    expect_tensors(module, **arguments)
    for name, value in arguments.items():
        if isinstance(value, Tensor) and (value.ndim == 0 or value.shape[-1] != width):
            where = f"{type(module).__name__}: {name}"
            raise ValueError(f"{where} must have shape (..., {width}), got {tuple(value.shape)}")
