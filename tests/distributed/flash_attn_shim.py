"""flash-attn's low-level functions on our blocks, so that ring-flash-attn runs without flash-attn.

Both rings then compute with the same code, and what differs is the ring.
"""

import sys
from types import ModuleType
from typing import Any

from torch import Tensor

from vlmkernels.distributed.block import View, partial_attention, partial_attention_backward


def _flash_attn_forward(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool,
    window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0,
    alibi_slopes: Any = None, return_softmax: bool = False,
) -> tuple[Tensor, Tensor, None, None]:  # fmt: skip
    out, lse = partial_attention(q, k, v, View(causal=causal), softmax_scale)
    return out.to(q.dtype), lse, None, None


def _flash_attn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, dropout_p: float, softmax_scale: float, causal: bool,
    window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0,
    alibi_slopes: Any = None, deterministic: bool = False, rng_state: Any = None,
) -> None:  # fmt: skip
    delta = (out.float() * dout).sum(-1).transpose(1, 2)
    found = partial_attention_backward(
        dout, q, k, v, softmax_lse, delta, View(causal=causal), softmax_scale
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
