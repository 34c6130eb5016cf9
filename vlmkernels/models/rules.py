"""What the choice of the next token must keep to, whatever the model's opinion is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmkernels.models.fields import INTEGER, NUMBER, expect
from vlmkernels.models.stopping import StopStrings


@dataclass(frozen=True)
class Rules:
    """When an answer ends, and which tokens it may not or should not have.

    eos: (n,) int64 token ids on the model's device; an answer ends with one of them, or after
    max_new_tokens, and not before it has min_new_tokens. What comes after the end is pad_id.
    stops: end it too, at any length.
    repetition_penalty: the score s of a token that prompt or answer already have becomes
    s / repetition_penalty where s > 0, else s * repetition_penalty (arXiv 1909.05858, section 4.1).
    """

    eos: Tensor
    pad_id: int = 0
    max_new_tokens: int = 128
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0
    stops: StopStrings | None = None

    def __post_init__(self) -> None:
        expect("max_new_tokens", self.max_new_tokens, INTEGER)
        expect("min_new_tokens", self.min_new_tokens, INTEGER)
        expect("repetition_penalty", self.repetition_penalty, NUMBER)
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {self.max_new_tokens}")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens: expected from 0 to max_new_tokens {self.max_new_tokens}, "
                f"got {self.min_new_tokens}"
            )
        if self.repetition_penalty <= 0:
            raise ValueError(
                f"repetition_penalty: expected a positive number, got {self.repetition_penalty}"
            )

    def ends(self, new: Tensor) -> Tensor:
        """Which answers (rows, n > 0), rows of the same prompt together, end with their last
        token."""
        ended = torch.isin(new[:, -1], self.eos)
        if self.stops is not None:
            ended = ended | torch.tensor(self.stops.hit(new), device=new.device)
        return ended

    def apply(self, scores: Tensor, seen: Tensor | None, num_new: int) -> Tensor:
        """scores (rows, vocab_size) of the token after num_new others, as they count."""
        if seen is not None:
            penalty = self.repetition_penalty
            penalized = torch.where(scores < 0, scores * penalty, scores / penalty)
            scores = torch.where(seen, penalized, scores)
        if num_new < self.min_new_tokens:
            scores = scores.index_fill(-1, self.eos, -torch.inf)
        return scores

    def seen(self, ids: Tensor, mask: Tensor | None, vocab_size: int) -> Tensor | None:
        """(rows, vocab_size): the tokens in ids (rows, n), 0 in mask for padding. None when the
        penalty is none."""
        if self.repetition_penalty == 1:
            return None
        counts = ids.new_zeros(len(ids), vocab_size)
        real = torch.ones_like(ids) if mask is None else (mask != 0).to(ids.dtype)
        return counts.scatter_add(1, ids, real) > 0
