"""Rivals of the activations: torch.nn.functional, transformers' modules, Liger's kernels."""

import torch.nn.functional as F
from torch import Tensor

from bench.rivals import NotSupportedError, rival


@rival("gelu", "F.gelu")
def torch_gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    return F.gelu(x, approximate=approximate)


@rival("quick_gelu", "transformers QuickGELUActivation", "transformers.activations")
def transformers_quick_gelu(x: Tensor) -> Tensor:
    from transformers.activations import QuickGELUActivation

    return QuickGELUActivation()(x)  # type: ignore[no-any-return]


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    if up is not None:
        return gate, up
    gate, up = gate.chunk(2, dim=-1)
    return gate, up


@rival("swiglu", "F.silu and *")
def torch_swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    gate, up = _halves(gate, up)
    return F.silu(gate) * up


@rival("swiglu", "Liger", "liger_kernel", needs_cuda=True)
def liger_swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    gate, up = _halves(gate, up)
    return LigerSiLUMulFunction.apply(gate, up)  # type: ignore[no-any-return]


@rival("geglu", "F.gelu and *")
def torch_geglu(gate: Tensor, up: Tensor | None = None, *, approximate: str = "tanh") -> Tensor:
    gate, up = _halves(gate, up)
    return F.gelu(gate, approximate=approximate) * up


@rival("geglu", "Liger", "liger_kernel", needs_cuda=True)
def liger_geglu(gate: Tensor, up: Tensor | None = None, *, approximate: str = "tanh") -> Tensor:
    from liger_kernel.ops.geglu import LigerGELUMulFunction

    if approximate != "tanh":
        raise NotSupportedError("tanh only")
    gate, up = _halves(gate, up)
    return LigerGELUMulFunction.apply(gate, up)  # type: ignore[no-any-return]
