"""Rivals of qk_norm_rope: transformers' modules, and torch's rms_norm before the rotation."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from bench.rivals import NotSupportedError, rival
from bench.rivals.rope import _tables

Norm = Callable[[Tensor, Tensor, float], Tensor]


def _transformers_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    module: Any = SimpleNamespace(weight=weight, variance_epsilon=eps)
    return Qwen2RMSNorm.forward(module, x)


def _torch_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def _register(name: str, module: str, norm: Norm) -> None:
    @rival("qk_norm_rope_from_tables", name, module)
    def from_tables(
        q: Tensor,
        k: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        rotary_dim: int | None = None,
        eps: float = 1e-6,
    ) -> Any:
        from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

        if (rotary_dim or q.shape[-1]) != q.shape[-1] or cos.shape[-1] != q.shape[-1]:
            raise NotSupportedError("partial")
        q, k = norm(q, q_weight, eps), norm(k, k_weight, eps)
        return apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=-2)

    @rival("qk_norm_rope", name, module)
    def of_positions(
        q: Tensor,
        k: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        position_ids: Tensor,
        sections: Sequence[int] | None = None,
        *,
        interleaved: bool = False,
        theta: float = 1e6,
        rotary_dim: int | None = None,
        eps: float = 1e-6,
    ) -> Any:
        """Reads tables of cos and sin, made once, untimed."""
        parts = (q.shape[-1] // 2,) if sections is None else tuple(sections)
        layout = "interleaved" if interleaved else "sections"
        cos, sin = _tables(position_ids, theta, q.shape[-1], parts, layout, q.dtype)
        return from_tables(q, k, q_weight, k_weight, cos, sin, rotary_dim=rotary_dim, eps=eps)


_register("transformers Qwen3VLTextRMSNorm", "transformers.models.qwen3_vl", _transformers_norm)
_register("F.rms_norm", "transformers.models.qwen2", _torch_norm)
