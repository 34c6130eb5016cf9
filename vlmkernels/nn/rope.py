"""Rotary position embeddings as modules without parameters: (q, k, position_ids) -> (q, k)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmkernels import ops
from vlmkernels.nn._arguments import typed
from vlmkernels.ops import _rotation


def check_rotation(
    module: torch.nn.Module,
    theta: float,
    rotary_dim: int | None = None,
    sections: Sequence[int] | None = None,
    interleaved: bool = False,
) -> None:
    """ValueError naming the module for what no call could take, whatever the head_dim."""
    pairs = 1 if rotary_dim is None else rotary_dim // 2
    try:
        if sections is not None:
            _rotation.check_sections(list(sections))
            pairs = sum(sections) if rotary_dim is None else pairs
        _rotation.frequencies(
            theta,
            2 * pairs if rotary_dim is None else rotary_dim,
            (pairs,) if sections is None else tuple(sections),
            "interleaved" if interleaved else "sections",
        )
    except ValueError as error:
        text = str(error).removeprefix("rope: ")
        raise ValueError(f"{type(module).__name__}: {text}") from None


class RotaryEmbedding(torch.nn.Module):
    """1-D `ops.rope` with its theta and rotary_dim."""

    @typed
    def __init__(self, *, theta: float = 10000.0, rotary_dim: int | None = None) -> None:
        super().__init__()
        check_rotation(self, theta, rotary_dim)
        self.theta, self.rotary_dim = theta, rotary_dim

    def forward(self, q: Tensor, k: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return ops.rope(q, k, position_ids, theta=self.theta, rotary_dim=self.rotary_dim)

    def extra_repr(self) -> str:
        return f"theta={self.theta}, rotary_dim={self.rotary_dim}"


class MRotaryEmbedding(torch.nn.Module):
    """`ops.mrope` with its sections: position_ids are (3, ...): time, height, width."""

    @typed
    def __init__(
        self,
        sections: Sequence[int],
        *,
        interleaved: bool = False,
        theta: float = 1e6,
        rotary_dim: int | None = None,
    ) -> None:
        super().__init__()
        check_rotation(self, theta, rotary_dim, sections, interleaved)
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

    @typed
    def __init__(self, *, theta: float = 10000.0) -> None:
        super().__init__()
        check_rotation(self, theta)
        self.theta = theta

    def forward(self, q: Tensor, k: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return ops.vision_rope(q, k, position_ids, theta=self.theta)

    def extra_repr(self) -> str:
        return f"theta={self.theta}"
