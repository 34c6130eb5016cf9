"""Rotary position embeddings as modules without parameters: (q, k, position_ids) -> (q, k)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmkernels import ops


class RotaryEmbedding(torch.nn.Module):
    """1-D `ops.rope` with its theta and rotary_dim."""

    def __init__(self, *, theta: float = 10000.0, rotary_dim: int | None = None) -> None:
        super().__init__()
        self.theta, self.rotary_dim = theta, rotary_dim

    def forward(self, q: Tensor, k: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return ops.rope(q, k, position_ids, theta=self.theta, rotary_dim=self.rotary_dim)

    def extra_repr(self) -> str:
        return f"theta={self.theta}, rotary_dim={self.rotary_dim}"


class MRotaryEmbedding(torch.nn.Module):
    """`ops.mrope` with its sections: position_ids are (3, ...): time, height, width."""

    def __init__(
        self,
        sections: Sequence[int],
        *,
        interleaved: bool = False,
        theta: float = 1e6,
        rotary_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.sections, self.interleaved = tuple(sections), interleaved
        self.theta, self.rotary_dim = theta, rotary_dim

    def forward(self, q: Tensor, k: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return ops.mrope(
            q,
            k,
            position_ids,
            self.sections,
            interleaved=self.interleaved,
            theta=self.theta,
            rotary_dim=self.rotary_dim,
        )

    def extra_repr(self) -> str:
        return (
            f"sections={list(self.sections)}, interleaved={self.interleaved}, "
            f"theta={self.theta}, rotary_dim={self.rotary_dim}"
        )


class VisionRotaryEmbedding(torch.nn.Module):
    """`ops.vision_rope` with its theta: position_ids are (2, ...): row and column of the patch."""

    def __init__(self, *, theta: float = 10000.0) -> None:
        super().__init__()
        self.theta = theta

    def forward(self, q: Tensor, k: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return ops.vision_rope(q, k, position_ids, theta=self.theta)

    def extra_repr(self) -> str:
        return f"theta={self.theta}"
