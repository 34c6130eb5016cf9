"""How an op meets PyTorch: one call of `define` in each room.

The dispatcher knows every op (torch.compile, export, opcheck, subclasses); a call with plain
tensors outside of any of these goes straight to the kernel, which saves several microseconds.
"""

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import (
    Any,
    ParamSpec,
    SupportsFloat,
    SupportsIndex,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

library = torch.library.Library("vlmkernels", "DEF")
ops: "dict[str, Op]" = {}
_references_only = False
FLAG = (bool, np.bool_)
_BLAMABLE = (AttributeError, IndexError, OverflowError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Op:
    """An op as `define` made it, for whoever lists the ops (info, tests)."""

    name: str
    schema: str
    kernel: Callable[..., Any]
    reference: Callable[..., Any]
    cpu: str


def define(
    schema: str,
    *,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    reference: Callable[..., Any],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
    backward: Callable[..., Any] | None = None,
    eager: Callable[..., Any] | None = None,
    inference: Callable[..., Any] | None = None,
    cpu: str = "C++",
) -> Callable[..., Any]:
    """Registers `vlmkernels::<schema>`; returns the function that runs it on positional arguments.

    kernel: runs it on CPU and CUDA tensors. fake: gives empty outputs of the right shape.
    reference: the same in plain differentiable PyTorch. setup_context, backward: as in
    torch.library.register_autograd; without them the op has no gradient.
    eager: the kernel of calls that the dispatcher need not see, where it differs: its outputs may
    be views of the inputs, or None for what there is none of. inference: the same for calls that
    need no gradient: None also for what only the backward reads.
    cpu: what `vlmkernels info` says runs it on the CPU.
    """
    name = schema.split("(")[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, kernel, "CPU")
    library.impl(name, kernel, "CUDA")
    qualified = f"vlmkernels::{name}"
    overload = getattr(torch.ops.vlmkernels, name).default
    torch.library.register_fake(qualified, _all_or_none_meta(overload, fake), lib=library)
    function = None
    if backward is not None:
        assert setup_context is not None
        torch.library.register_autograd(
            qualified, backward, setup_context=setup_context, lib=library
        )
        function = _autograd_function(name, eager or kernel, setup_context, backward)
    direct = inference or eager or kernel
    # Behind the last tensor there is nothing to look at, and looking is what a call costs.
    is_tensor = ["Tensor" in str(argument.type) for argument in overload._schema.arguments]
    num_args = len(is_tensor) - is_tensor[::-1].index(True)

    def call(*args: Any) -> Any:
        # Kernels know no tangents and no torch.func transforms; plain PyTorch does.
        if _references_only or forward_ad._current_level >= 0 or _transforms_active():
            return reference(*args)
        kind = _kind_of_call(args[:num_args])
        if kind == _DISPATCHED:
            return overload(*args)
        if kind == _DIFFERENTIABLE and function is not None:
            return function.apply(*args)
        return direct(*args)

    ops[name] = Op(name, schema, kernel, reference, cpu)
    return call


def _all_or_none_meta(
    overload: torch._ops.OpOverload, fake: Callable[..., Any]
) -> Callable[..., Any]:
    """fake, for meta tensors: beside a real first tensor one would leave the outputs unwritten."""
    op, names = overload._opname, [argument.name for argument in overload._schema.arguments]

    def checked(*args: Any) -> Any:
        tensors = [(name, x) for name, x in zip(names, args, strict=False) if isinstance(x, Tensor)]
        first, device = tensors[0][0], tensors[0][1].device
        if device.type != "meta":
            for name, x in tensors:
                if x.is_meta:
                    where = f"on the device of {first} ({device})"
                    raise TypeError(f"{op}: {name} must be {where}, got meta")
        return fake(*args)

    return checked


def _autograd_function(
    name: str,
    kernel: Callable[..., Any],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., Any],
) -> type[torch.autograd.Function]:
    # Not Function.setup_context: that way torch inspects the signature at each call.
    def forward(ctx: Any, *args: Any) -> Any:
        output = kernel(*args)
        setup_context(ctx, args, output)
        return output

    once = once_differentiable(backward)

    def gradient(ctx: Any, *grads: Any) -> Any:
        # once_differentiable costs a microsecond, and matters for create_graph=True only.
        return (once if _is_grad_enabled() else backward)(ctx, *grads)

    members = {"forward": staticmethod(forward), "backward": staticmethod(gradient)}
    return type(name, (torch.autograd.Function,), members)


P = ParamSpec("P")
R = TypeVar("R")


def public(function: Callable[P, R]) -> Callable[P, R]:
    """For a public function: an error names it, not the op it shares, and the argument to blame.

    The core checks what it takes; what fails before is looked for in the type hints. Only a call
    that failed pays for that. Flags are looked at before, since anything is true or false.
    """
    parameters = inspect.signature(function).parameters.values()
    flags = [each.name for each in parameters if each.annotation is bool]

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for flag in flags:
            if not isinstance(value := kwargs.get(flag, False), FLAG):
                where = f"{function.__name__}: {flag}"
                raise TypeError(f"{where} must be a bool, got {value!r:.80}")
        try:
            return function(*args, **kwargs)
        except (
            AttributeError,
            IndexError,
            OverflowError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            op, colon, text = str(error).partition(": ")
            if isinstance(error, (TypeError, ValueError)) and colon and op.isidentifier():
                error.args = (f"{function.__name__}: {text}",)
            else:
                _blame_argument(function, args, kwargs)
            raise

    return checked


def _blame_argument(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    hints = get_type_hints(function)
    try:
        arguments = inspect.signature(function).bind(*args, **kwargs).arguments
    except TypeError:  # too many or too few: the error says so
        return
    tensors = {name: x for name, x in arguments.items() if isinstance(x, Tensor)}
    for name, value in arguments.items():
        where = f"{function.__name__}: {name}"
        if not fits(value, hints[name]):
            kind, got = f"of type {inspect.formatannotation(hints[name])}", f"{value!r:.80}"
            if hints[name] is Tensor:
                kind, got = "a torch.Tensor", type(value).__name__
            raise TypeError(f"{where} must be {kind}, got {got}") from None
        if isinstance(value, int) and value.bit_length() > 63:
            raise ValueError(f"{where} must be below 2^63, got {value!r:.80}") from None
        if not isinstance(value, Tensor):
            continue
        if value.layout != torch.strided:
            raise TypeError(f"{where} must be a strided tensor, got {value.layout}") from None
        if hints[name] is Tensor and value.ndim == 0:
            raise ValueError(f"{where} must have at least one dimension, got ()") from None
        first, x = next(iter(tensors.items()))
        if value.is_meta and not x.is_meta:
            place = f"on the device of {first} ({x.device})"
            raise TypeError(f"{where} must be {place}, got meta") from None


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the type that a public function or module asks for."""
    if hint is Any:
        return True
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (types.UnionType, Union):
        return any(fits(value, each) for each in inner)
    if kind is tuple:
        is_pair = isinstance(value, (tuple, list)) and len(value) == len(inner)
        return is_pair and all(map(fits, value, inner))
    if kind is Sequence:
        is_sequence = isinstance(value, Sequence) and not isinstance(value, str)
        return is_sequence and all(fits(each, inner[0]) for each in value)
    if hint in (int, float):  # numpy's numbers as well
        number = SupportsIndex if hint is int else SupportsFloat
        return isinstance(value, number) and not isinstance(value, (bool, Tensor, np.ndarray))
    if hint is bool:
        return isinstance(value, FLAG)
    return isinstance(value, hint)


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """The arguments as PyTorch's own matrix products take them under autocast.

    Where it is on for the device of the first one: floating tensors, float64 excepted, in its
    dtype. Everything else, None too, as it is.
    """
    if not (_is_compiling() or _any_autocast()):  # the cheap question first
        return tensors
    device = tensors[0].device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        x.to(dtype)
        if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
        else x
        for x in tensors
    )


def rows(x: Tensor) -> Tensor:
    """x, or a copy where a row is no run of elements or no one stride leads from row to row."""
    if x.is_contiguous():
        return x
    if x.stride(-1) != 1:
        return x.contiguous()
    try:
        x.view(-1, x.shape[-1])
    except RuntimeError:
        return x.contiguous()
    return x


# Of x's shape, contiguous, not initialised: twice as fast as x.new_empty(x.shape).
empty = functools.partial(torch.empty_like, memory_format=torch.contiguous_format)

_is_compiling = torch.compiler.is_compiling
_any_autocast = torch._C._is_any_autocast_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms_active = torch._C._are_functorch_transforms_active
_is_grad_enabled = torch.is_grad_enabled
_Parameter = torch.nn.Parameter
_NO_TENSORS = frozenset((int, float, bool, str, list))
_DISPATCHED, _PLAIN, _DIFFERENTIABLE = range(3)


def _kind_of_call(args: Sequence[Any]) -> int:
    """_DISPATCHED when more than the kernel must see this call; else whether autograd is to record
    it. One pass: every microsecond is paid in each call."""
    if _is_compiling() or _dispatch_modes():
        return _DISPATCHED
    kind, records = _PLAIN, _is_grad_enabled()
    for arg in args:
        if arg is None:
            continue
        type_ = type(arg)
        if type_ is Tensor or type_ is _Parameter:
            if arg.is_meta or arg.is_neg():  # a lazy sign, which the dispatcher resolves
                return _DISPATCHED
            if records and arg.requires_grad:
                kind = _DIFFERENTIABLE
        elif type_ not in _NO_TENSORS and isinstance(arg, Tensor):
            return _DISPATCHED
    return kind


def _is_plain(args: Sequence[Any]) -> bool:
    """True when nothing but the kernel needs to see this call."""
    return _kind_of_call(args) != _DISPATCHED


def reference_gradients(
    reference: Callable[..., Any], inputs: Sequence[Any], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of reference(*inputs) by autograd, where there is no backward kernel.

    Returns one gradient (or None) for each input.
    """
    with torch.enable_grad():
        leaves = [
            x.detach().requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x
            for x in inputs
        ]
        outputs = reference(*leaves)
        outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
        wanted = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad]
        found = torch.autograd.grad(
            [o for o, _ in pairs],
            [leaves[i] for i in wanted],
            [g for _, g in pairs],
            allow_unused=True,
        )
    gradients: list[Tensor | None] = [None] * len(leaves)
    for i, gradient in zip(wanted, found, strict=True):
        gradients[i] = gradient
    return gradients


def references_only() -> bool:
    """True inside `reference_ops()`."""
    return _references_only


@contextlib.contextmanager
def reference_ops() -> Iterator[None]:
    """Within the context every op runs as its plain PyTorch reference."""
    global _references_only
    before, _references_only = _references_only, True
    try:
        yield
    finally:
        _references_only = before
