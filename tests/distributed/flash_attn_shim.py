"""flash-attn's low-level functions on our blocks, so that ring-flash-attn runs without flash-attn.

Both rings then compute with the same code, and what differs is the ring.
"""

import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vlmkernels.distributed.block import partial_attention, partial_attention_backward


def _interval(q: Tensor, k: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """first, last, positions_k of flash-attn's bottom-right causal mask."""
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    last = torch.full((1, seqlen_q), seqlen_k - 1, dtype=torch.int32)
    if causal:
        last = torch.arange(seqlen_q, dtype=torch.int32)[None] + seqlen_k - seqlen_q
    return torch.zeros_like(last), last, torch.arange(seqlen_k, dtype=torch.int32)


def _flash_attn_forward(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool,
    window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0,
    alibi_slopes: Any = None, return_softmax: bool = False,
) -> tuple[Tensor, Tensor, None, None]:  # fmt: skip
    out, lse = partial_attention(q, k, v, *_interval(q, k, causal), softmax_scale)
    return out.to(q.dtype), lse, None, None


def _flash_attn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, dropout_p: float, softmax_scale: float, causal: bool,
    window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0,
    alibi_slopes: Any = None, deterministic: bool = False, rng_state: Any = None,
) -> None:  # fmt: skip
    delta = (out.float() * dout).sum(-1).transpose(1, 2)
    found = partial_attention_backward(
        dout, q, k, v, softmax_lse, delta, *_interval(q, k, causal), softmax_scale
    )
    for to, x in zip((dq, dk, dv), found, strict=True):
        to.copy_(x)


def install() -> None:
    """Makes `import ring_flash_attn` work; its Hugging Face adapters stay out."""
    interface = ModuleType("flash_attn.flash_attn_interface")
    for function in (_flash_attn_forward, _flash_attn_backward):
        setattr(interface, function.__name__, function)
    for name in ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward"):
        setattr(interface, name, lambda: None)  # imported, not used here
    adapters: Any = ModuleType("ring_flash_attn.adapters")
    adapters.substitute_hf_flash_attn = adapters.update_ring_flash_attn_params = None
    sys.modules |= {
        "flash_attn": ModuleType("flash_attn"),
        "flash_attn.flash_attn_interface": interface,
        "ring_flash_attn.adapters": adapters,
    }
