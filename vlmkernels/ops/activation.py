"""activation: QuickGELU, GELU, and the gated SwiGLU and GEGLU; the backward recomputes."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmkernels import _core
from vlmkernels.ops import _library

_APPROXIMATE = {"none": "gelu", "tanh": "gelu_tanh"}


@_library.public
def quick_gelu(x: Tensor) -> Tensor:
    """y = x * sigmoid(1.702 x).

    Args:
        x: any shape, floating point; copied first where it is not contiguous.

    Returns:
        A new contiguous tensor of x's dtype; computed in fp32 and rounded once. Only x is kept
        for the gradient.

    Raises:
        TypeError: x is not a floating-point tensor.

    The GELU of CLIP and of the Qwen2-VL vision tower (arXiv 1606.08415, section 2).
    """
    return _activation(x, "quick_gelu")  # type: ignore[no-any-return]


@_library.public
def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """y = x * Phi(x), Phi the normal distribution function; approximate="tanh":
    y = x/2 * (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).

    Args:
        x: as in `quick_gelu`, which also says what is returned and raised.
        approximate: "none" or "tanh".

    Hendrycks and Gimpel, arXiv 1606.08415. Drop-in for torch.nn.functional.gelu.
    """
    return _activation(x, kind_of("gelu", approximate))  # type: ignore[no-any-return]


@_library.public
def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """y = silu(gate) * up, silu(g) = g * sigmoid(g).

    Args:
        gate: (..., mlp_dim), floating point; or, without `up`, (..., 2 * mlp_dim): the result of
            one fused projection, gate first. Where mlp_dim is not contiguous or rows do not lie at
            one stride they are copied first; halves of a fused projection are not.
        up: (..., mlp_dim), of gate's shape and dtype.

    Returns:
        (..., mlp_dim), a new contiguous tensor of gate's dtype; computed in fp32 and rounded once.
        Only gate and up are kept for the gradient, which for a fused projection is written as one.

    Raises:
        ValueError: wrong shapes. TypeError: wrong dtypes or devices.

    Shazeer, arXiv 2002.05202. Between the projections of transformers' Qwen2MLP and LlamaMLP.
    """
    return _gated_activation(gate, up, "silu")  # type: ignore[no-any-return]


@_library.public
def geglu(gate: Tensor, up: Tensor | None = None, *, approximate: str = "tanh") -> Tensor:
    """y = gelu(gate) * up, by the formulas of `gelu`.

    Args:
        approximate: "tanh" (Gemma, PaliGemma) or "none".
        gate, up: as in `swiglu`, which also says what is returned and raised.

    Shazeer, arXiv 2002.05202.
    """
    return _gated_activation(gate, up, kind_of("geglu", approximate))  # type: ignore[no-any-return]


def kind_of(op: str, approximate: str) -> str:
    """What the core calls it."""
    if approximate not in _APPROXIMATE:
        raise ValueError(f"{op}: approximate must be 'none' or 'tanh', got {approximate!r}")
    return _APPROXIMATE[approximate]


def reference(x: Tensor, kind: str) -> Tensor:
    if kind == "silu":
        return F.silu(x)
    if kind == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


def reference_gated(gate: Tensor, up: Tensor | None, kind: str) -> Tensor:
    gate, up = (gate, up) if up is not None else gate.chunk(2, dim=-1)
    return reference(gate, kind) * up


def reference_backward(dy: Tensor, x: Tensor, kind: str) -> Tensor:
    (dx,) = _library.reference_gradients(lambda x: reference(x, kind), [x], [dy])
    assert dx is not None
    return dx


def reference_gated_backward(
    dy: Tensor, gate: Tensor, up: Tensor | None, kind: str
) -> tuple[Tensor, Tensor]:
    def run(gate: Tensor, up: Tensor | None) -> Tensor:
        return reference_gated(gate, up, kind)

    dgate, dup = _library.reference_gradients(run, [gate, up], [dy])
    assert dgate is not None
    return dgate, gate.new_empty(0) if dup is None else dup


def _kernel(x: Tensor, kind: str) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    return y if _core.C.activation(x, y, kind) else reference(x, kind)


def _kernel_backward(dy: Tensor, x: Tensor, kind: str) -> Tensor:
    x = x.contiguous()
    dx = torch.empty_like(x)
    if _core.C.activation_backward(dy, x, dx, kind):
        return dx
    return reference_backward(dy, x, kind)


def _kernel_gated(gate: Tensor, up: Tensor | None, kind: str) -> Tensor:
    gate, up = _library.rows(gate), None if up is None else _library.rows(up)
    y = _fake_gated(gate, up, kind)
    return y if _core.C.gated_activation(gate, up, y, kind) else reference_gated(gate, up, kind)


def _kernel_gated_backward(
    dy: Tensor, gate: Tensor, up: Tensor | None, kind: str
) -> tuple[Tensor, Tensor]:
    gate, up = _library.rows(gate), None if up is None else _library.rows(up)
    dgate, dup = _fake_gated_backward(dy, gate, up, kind)
    given = dup if up is not None else None
    if _core.C.gated_activation_backward(dy, gate, up, dgate, given, kind):
        return dgate, dup
    return reference_gated_backward(dy, gate, up, kind)


def _fake(x: Tensor, kind: str) -> Tensor:
    return _library.empty(x)


def _fake_backward(dy: Tensor, x: Tensor, kind: str) -> Tensor:
    return _fake(x, kind)


def _fake_gated(gate: Tensor, up: Tensor | None, kind: str) -> Tensor:
    if up is not None:
        return _fake(gate, kind)
    return gate.new_empty((*gate.shape[:-1], gate.shape[-1] // 2))


def _fake_gated_backward(
    dy: Tensor, gate: Tensor, up: Tensor | None, kind: str
) -> tuple[Tensor, Tensor]:
    return _fake(gate, kind), gate.new_empty(0) if up is None else _fake(up, kind)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.kind = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return _activation_backward(dy.contiguous(), *ctx.saved_tensors, ctx.kind), None


def _backward_gated(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    gate, up = ctx.saved_tensors
    dgate, dup = _gated_activation_backward(dy.contiguous(), gate, up, ctx.kind)
    return dgate, None if up is None else dup, None


_activation = _library.define(
    "activation(Tensor x, str kind) -> Tensor",
    kernel=_kernel,
    fake=_fake,
    reference=reference,
    setup_context=_setup_context,
    backward=_backward,
)
_activation_backward = _library.define(
    "activation_backward(Tensor dy, Tensor x, str kind) -> Tensor",
    kernel=_kernel_backward,
    fake=_fake_backward,
    reference=reference_backward,
)
_gated_activation = _library.define(
    "gated_activation(Tensor gate, Tensor? up, str kind) -> Tensor",
    kernel=_kernel_gated,
    fake=_fake_gated,
    reference=reference_gated,
    setup_context=_setup_context,
    backward=_backward_gated,
)
_gated_activation_backward = _library.define(
    "gated_activation_backward(Tensor dy, Tensor gate, Tensor? up, str kind)"
    " -> (Tensor dgate, Tensor dup)",
    kernel=_kernel_gated_backward,
    fake=_fake_gated_backward,
    reference=reference_gated_backward,
)
