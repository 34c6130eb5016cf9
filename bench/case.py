"""What a bench file gives: cases, each a set of variants that compute the same thing."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlmkernels import ops


@dataclass(frozen=True)
class Case:
    """One line of the bench table.

    variants: name -> function without arguments, whose results must agree; "vlmkernels" is ours and
    "eager" the plain PyTorch code that it replaces. bytes: what must be read and written at least.
    flops: multiply and add count as two.

    function, inputs: ops.<function>(**inputs) is what is computed; rivals of that function (see
    bench/rivals) then join the variants. In a backward case the tensors of `inputs` that require a
    gradient are the ones to differentiate by, in this order. eager: the eager code as a function of
    the same inputs; torch.compile of it then joins as well.
    """

    op: str
    shape: str  # a named shape and its sizes, e.g. "qwen2vl_7b 4096x28x128"
    dtype: str
    direction: str  # "fwd" | "bwd" | "fwd+bwd"; for models "prefill" | "decode" | "train step"
    bytes: int
    flops: int
    variants: dict[str, Callable[[], Any]] = field(repr=False)
    function: str = ""
    inputs: Mapping[str, Any] = field(default_factory=dict, repr=False)
    eager: Callable[..., Any] | None = field(default=None, repr=False)
    seqlen: int = 0  # length by which cases of one named shape form a line in the plot of times
    tokens: int = 0  # that one call takes: the case is a whole model, timed with the wall clock
    note: str = ""


def both_directions(
    function: str,
    inputs: Mapping[str, Any],
    eager: Callable[..., Any],
    *,
    bytes: tuple[int, int],
    flops: tuple[int, int],
    **fields: Any,
) -> Iterator[Case]:
    """The forward and the backward case of ops.<function>(**inputs) against eager(**inputs).

    bytes, flops: of (forward, backward). fields: op, shape, dtype and what else is alike in both.
    """
    ours = getattr(ops, function)
    for i, (direction, bind) in enumerate((("fwd", forward), ("bwd", gradient))):
        yield Case(
            **fields,
            direction=direction,
            bytes=bytes[i],
            flops=flops[i],
            variants={
                "vlmkernels": lazily(bind, ours, inputs),
                "eager": lazily(bind, eager, inputs),
            },
            function=function,
            inputs=inputs,
            eager=eager,
        )


def gradient(function: Callable[..., Any], inputs: Mapping[str, Any]) -> Callable[[], Any]:
    """A function that runs only the backward of function(**inputs); the same dy for every variant.

    Returns the gradients of those inputs that require one; parameters of `inputs` are untouched.
    """
    leaves = {
        name: x.detach().requires_grad_()
        for name, x in inputs.items()
        if isinstance(x, Tensor) and x.requires_grad
    }
    outputs = tensors(function(**{**inputs, **leaves}))
    outputs = [y for y in outputs if y.requires_grad]
    grads = [_same_noise(y) for y in outputs]
    wanted = list(leaves.values())
    return lambda: torch.autograd.grad(outputs, wanted, grads, retain_graph=True)


def forward(function: Callable[..., Any], inputs: Mapping[str, Any]) -> Callable[[], Any]:
    """A function that runs function(**inputs) without recording it for autograd."""
    plain = {name: x.detach() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    return lambda: function(**plain)


def lazily(
    bind: Callable[..., Callable[[], Any]], function: Callable[..., Any], inputs: Mapping[str, Any]
) -> Callable[[], Any]:
    """bind(function, inputs) at the first call, where its errors and its memory belong."""
    bound: list[Callable[[], Any]] = []

    def run() -> Any:
        if not bound:
            bound.append(bind(function, inputs))
        return bound[0]()

    return run


def tensors(result: Any) -> list[Tensor]:
    """All tensors of a result, in order."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, Sequence) and not isinstance(result, str):
        return [x for part in result for x in tensors(part)]
    return []


def dtype_name(x: Tensor) -> str:
    """As `--dtype` takes it."""
    return str(x.dtype).removeprefix("torch.")


def in_float32(case: Case) -> list[Tensor]:
    """What the eager code of a case gives for the same numbers in float32."""
    assert case.eager is not None
    inputs = {
        name: x.detach().float().requires_grad_(x.requires_grad)
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for name, x in case.inputs.items()
    }
    bind = gradient if case.direction == "bwd" else forward
    return tensors(bind(case.eager, inputs)())


def _same_noise(y: Tensor) -> Tensor:
    """The same numbers in every dtype."""
    generator = torch.Generator(y.device).manual_seed(0)
    noise = torch.randn(y.shape, generator=generator, device=y.device)
    return noise.to(torch.bfloat16).to(y.dtype)
