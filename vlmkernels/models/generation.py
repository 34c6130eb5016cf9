"""Text generation: prefill once, then one token of every row per step, until all rows end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from vlmkernels.models.cache import KVCache
from vlmkernels.models.tokenizer import Tokenizer


@dataclass
class DecodeState:
    """What a model carries from step to step."""

    cache: KVCache
    next_positions: Tensor  # (batch,) int64: position of the next token along every axis


class Decoder(Protocol):
    """A model that generates: `prefill` reads the prompt, `decode` one more token per row."""

    def prefill(self, max_new_tokens: int, **inputs: Any) -> tuple[Tensor, DecodeState]: ...

    def decode(self, tokens: Tensor, state: DecodeState) -> Tensor: ...


@dataclass(frozen=True)
class Sampling:
    """Greedy at temperature 0; else softmax(logits / temperature), cut to the top_k most likely
    tokens and to the smallest set that holds probability top_p."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature: expected at least 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k: expected at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected in (0, 1], got {self.top_p}")

    def logits(self, logits: Tensor) -> Tensor:
        """(batch, vocab_size) -> fp32 with -inf for every token that may not be drawn."""
        logits = logits.float() / self.temperature
        if self.top_k is not None:
            kth = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < kth, -torch.inf)
        if self.top_p is not None:
            ordered, order = logits.sort(descending=True)
            probability = ordered.softmax(-1)
            # A token stays while those before it hold less than top_p; so the first always stays.
            drop = probability.cumsum(-1) - probability >= self.top_p
            logits = logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
        return logits

    def draw(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """(batch, vocab_size) -> (batch,) token ids."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        probability = self.logits(logits).softmax(dim=-1)
        return torch.multinomial(probability, 1, generator=generator)[:, 0]


def generate_steps(
    model: Decoder,
    inputs: dict[str, Any],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """One (batch,) tensor of token ids per step; a row that ended gives `pad_token_id`."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    logits, state = model.prefill(max_new_tokens, **inputs)
    eos = torch.tensor(list(eos_token_ids), dtype=torch.int64, device=logits.device)
    ended = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    for step in range(max_new_tokens):
        tokens = sampling.draw(logits, generator).masked_fill(ended, pad_token_id)
        ended = ended | torch.isin(tokens, eos)
        yield tokens
        if step + 1 == max_new_tokens or bool(ended.all()):
            return
        logits = model.decode(tokens, state)


def stream_text(tokenizer: Tokenizer, steps: Iterator[Tensor]) -> Iterator[str]:
    """The text of one row's `generate_steps`, piece by piece as it becomes certain."""
    stream = tokenizer.stream()
    for tokens in steps:
        if len(tokens) != 1:
            raise ValueError(f"stream_text: expected a batch of one, got {len(tokens)}")
        if piece := stream.push(int(tokens)):
            yield piece
    if piece := stream.finish():
        yield piece


def make_generator(seed: int | None, device: torch.device) -> torch.Generator | None:
    return None if seed is None else torch.Generator(device).manual_seed(seed)
