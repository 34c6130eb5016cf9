"""Between the projections and the attention of Qwen3 and Qwen3-VL: q_norm, k_norm, rotation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmkernels import ops
from vlmkernels.nn._arguments import typed
from vlmkernels.nn.norm import RMSNorm
from vlmkernels.nn.rope import check_rotation


class QKNormRotaryEmbedding(torch.nn.Module):
    """(q, k, position_ids) -> `ops.qk_norm_rope`, with the weights of both norms.

    state_dict keys `q_norm.weight` and `k_norm.weight`, as in transformers' Qwen3VLTextAttention
    (sections [24, 20, 20], interleaved) and Qwen3Attention (no sections). In the place of
    position_ids a pair (cos, sin) will do: what transformers hands to its layers as
    position_embeddings.
    """

    @typed
    def __init__(
        self,
        head_dim: int,
        sections: Sequence[int] | None = None,
        *,
        interleaved: bool = False,
        theta: float = 1e6,
        rotary_dim: int | None = None,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if interleaved and sections is None:
            raise ValueError("QKNormRotaryEmbedding: interleaved needs sections, got None")
        check_rotation(self, theta, rotary_dim, sections, interleaved)
        self.sections = None if sections is None else tuple(sections)
        self.interleaved, self.theta = interleaved, theta
        self.rotary_dim, self.eps = rotary_dim, eps
        self.q_norm, self.k_norm = (
            RMSNorm(head_dim, eps, device=device, dtype=dtype) for _ in range(2)
        )

    def forward(
        self, q: Tensor, k: Tensor, position_ids: Tensor | tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        weights = self.q_norm.weight, self.k_norm.weight
        if isinstance(position_ids, tuple):
            return ops.qk_norm_rope_from_tables(
                *(q, k, *weights, *position_ids), rotary_dim=self.rotary_dim, eps=self.eps
            )
        return ops.qk_norm_rope(
            *(q, k, *weights, position_ids, self.sections),
            interleaved=self.interleaved,
            theta=self.theta,
            rotary_dim=self.rotary_dim,
            eps=self.eps,
        )

    def extra_repr(self) -> str:
        sections = None if self.sections is None else list(self.sections)
        return (
            f"sections={sections}, interleaved={self.interleaved}, theta={self.theta}, "
            f"rotary_dim={self.rotary_dim}"
        )
