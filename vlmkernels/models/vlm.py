"""What the generative models share: pictures spliced into the tokens of a packed decoder."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from vlmkernels.distributed import ContextPlan
from vlmkernels.distributed.context import active_plan, mean_over_ranks
from vlmkernels.models.cache import KVCache
from vlmkernels.models.checkpoint import Json
from vlmkernels.models.decoder import PackedDecoder, next_token_loss
from vlmkernels.models.generation import DecodeState, Generates
from vlmkernels.models.output import Output
from vlmkernels.models.packing import Packing, expect_grid, expect_no_empty_row, make_packing
from vlmkernels.models.pretrained import PretrainedGenerator


@dataclass
class VLMOutput(Output):
    """logits (batch, seqlen, vocab_size), zeros on padding; loss () when labels were given."""

    logits: Tensor
    loss: Tensor | None = None


@dataclass
class Embedded:
    """A prompt ready for the decoder."""

    x: Tensor  # (batch, seqlen, hidden_size), the pictures in their places
    position_ids: Tensor  # (num_axes, batch, seqlen)
    attention_mask: Tensor | None  # (batch, seqlen), 0 on padding
    text_positions: Tensor | None = None  # (batch, seqlen) running indices of packed documents


class VLM(PretrainedGenerator, Generates[DecodeState]):
    """A vision tower and a decoder. A model says where they are and how inputs become `Embedded`.

    All rows of a batch go through the decoder as one run of tokens: padding never reaches a kernel.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.generation_config: Json = {}

    @property
    @abstractmethod
    def decoder(self) -> PackedDecoder: ...

    @property
    @abstractmethod
    def head_weight(self) -> Tensor:
        """(vocab_size, hidden_size)"""

    @abstractmethod
    def embed(self, inputs: Any) -> Embedded: ...

    @property
    def device(self) -> torch.device:
        return self.decoder.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.embed_tokens.weight.dtype

    def run(
        self,
        inputs: Any,
        labels: Tensor | None,
        num_items_in_batch: Tensor | int | None,
        logits_to_keep: int,
    ) -> VLMOutput:
        """The body of every model's `forward`."""
        if labels is not None and logits_to_keep:
            raise ValueError("logits_to_keep: expected 0 with labels, the loss needs all logits")
        prompt = self.embed(inputs)
        batch, seqlen, _ = prompt.x.shape
        expect_labels(labels, prompt.x, len(self.head_weight))
        packing = make_packing(
            batch, seqlen, prompt.x.device, prompt.attention_mask, prompt.text_positions
        )
        plan = active_plan(packing.cu_seqlens)
        if plan is not None:
            if logits_to_keep:
                raise ValueError("logits_to_keep: expected 0 inside of context_parallel")
            return self._run_parallel(prompt, packing, plan, labels, num_items_in_batch)
        h = self._hidden_states(prompt, packing)
        if logits_to_keep:
            return VLMOutput(self._head(packing.unpack(h)[:, -logits_to_keep:]))
        logits = self._head(h)
        loss = None
        if labels is not None:
            loss = next_token_loss(logits, packing.pack(_shift(labels)), num_items_in_batch)
        return VLMOutput(packing.unpack(logits), loss)

    def _run_parallel(
        self,
        prompt: Embedded,
        packing: Packing,
        plan: ContextPlan,
        labels: Tensor | None,
        num_items_in_batch: Tensor | int | None,
    ) -> VLMOutput:
        """This rank's tokens; see `vlmkernels.distributed.context_parallel`."""
        positions = packing.pack(prompt.position_ids.permute(1, 2, 0)).T
        h = self.decoder(
            plan.shard(packing.pack(prompt.x), 0), plan.shard(positions, 1).contiguous(),
            packing.cu_seqlens, packing.max_seqlen, plan=plan,
        )  # fmt: skip
        logits = self._head(h)
        if labels is None:
            return VLMOutput(logits)
        targets = plan.shard(packing.pack(_shift(labels)), 0)
        part = next_token_loss(logits, targets, 1)
        count = (targets != -100).sum()
        if num_items_in_batch is not None:
            share = torch.as_tensor(num_items_in_batch, device=part.device) / plan.layout.size
            count = share.to(part.dtype)
        return VLMOutput(logits, mean_over_ranks(part, count, plan))

    @torch.inference_mode()
    def prefill(self, max_new_tokens: int, **inputs: Any) -> tuple[Tensor, DecodeState]:
        """See `vlmkernels.models.generation.Generates`; `inputs` as of `forward`."""
        prompt = self.embed(self.inputs_class(**inputs))
        x, position_ids, mask = prompt.x, prompt.position_ids, prompt.attention_mask
        if prompt.text_positions is not None:
            raise ValueError("position_ids: expected no documents, generation continues one")
        packing = make_packing(x.shape[0], x.shape[1], x.device, mask)
        expect_no_empty_row(packing)
        max_seqlen = packing.max_seqlen + max_new_tokens
        if (limit := self.decoder.max_positions) is not None and max_seqlen > limit:
            raise ValueError(
                f"max_new_tokens: expected at most {limit} tokens with the prompt, got {max_seqlen}"
            )
        cache = KVCache(
            *(len(self.decoder.layers), x.shape[0], max_seqlen),
            *(self.decoder.num_heads_k, self.decoder.head_dim),
            dtype=x.dtype,
            device=x.device,
        )
        cache.start(packing)
        h = self._hidden_states(prompt, packing, cache)
        if mask is not None:
            position_ids = position_ids.masked_fill(mask == 0, 0)
        state = DecodeState(cache, position_ids.amax(dim=(0, 2)) + 1)
        return self._head(h[packing.cu_seqlens[1:] - 1]), state

    @torch.inference_mode()
    def decode(self, tokens: Tensor, state: DecodeState) -> Tensor:
        """See `vlmkernels.models.generation.Generates`."""
        packing = make_packing(len(tokens), 1, tokens.device)
        state.cache.advance()
        position_ids = state.next_positions.expand(self.decoder.num_axes, -1).contiguous()
        x = self.decoder.embed_tokens(tokens)
        h = self.decoder(x, position_ids, packing.cu_seqlens, packing.max_seqlen, state.cache)
        state.next_positions = state.next_positions + 1
        return self._head(h)

    def _hidden_states(
        self, prompt: Embedded, packing: Packing, cache: KVCache | None = None
    ) -> Tensor:
        """Packed (num_tokens, hidden_size)."""
        positions = packing.pack(prompt.position_ids.permute(1, 2, 0)).T.contiguous()
        h: Tensor = self.decoder(
            packing.pack(prompt.x), positions, packing.cu_seqlens, packing.max_seqlen, cache
        )
        return h

    def _head(self, h: Tensor) -> Tensor:
        """(..., hidden_size) -> (..., vocab_size)"""
        return torch.nn.functional.linear(h, self.head_weight)

    def tied_names(self) -> Mapping[str, str]:
        # Files of models with tied embeddings may hold the head as well.
        tied = self.config.tie_word_embeddings
        return {"lm_head.weight": "model.embed_tokens.weight"} if tied else {}


def expect_ids(ids: Tensor, vocab_size: int, name: str = "input_ids") -> None:
    """Token ids (batch, seqlen) that the embedding has; else ValueError or TypeError."""
    expect_id_grid(ids, name)
    # On a GPU the values are not looked at: that would stall every batch.
    if looks_at(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise ValueError(
            f"{name}: expected in [0, {vocab_size}), got {int(ids.min())} to {int(ids.max())}"
        )


def expect_id_grid(ids: Tensor, name: str) -> None:
    """(batch, seqlen) of integers; else ValueError or TypeError."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(ids).__name__}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected int32 or int64, got {ids.dtype}")
    if ids.ndim != 2 or ids.numel() == 0:
        raise ValueError(f"{name}: expected shape (batch, seqlen), got {tuple(ids.shape)}")


def expect_labels(labels: Tensor | None, x: Tensor, vocab_size: int) -> None:
    """Token ids or -100, (batch, seqlen) as x, or None; else ValueError or TypeError."""
    if labels is None:
        return
    expect_id_grid(labels, "labels")
    expect_grid("labels", labels, x)
    if looks_at(labels) and len(counted := labels[labels != -100]):
        low, high = int(counted.min()), int(counted.max())
        if not 0 <= low <= high < vocab_size:
            raise ValueError(
                f"labels: expected -100 or in [0, {vocab_size}), got {low if low < 0 else high}"
            )


def looks_at(x: Tensor) -> bool:
    """Whether the values may be checked: on the CPU, outside of torch.compile."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


class HasEmbedding(Protocol):
    @property
    def embed_tokens(self) -> torch.nn.Embedding: ...


def embed_text(ids: Tensor | None, embeds: Tensor | None, language: HasEmbedding) -> Tensor:
    """(batch, seqlen, hidden_size) from exactly one of input_ids and inputs_embeds."""
    if (ids is None) == (embeds is None):
        raise ValueError("input_ids: expected exactly one of input_ids and inputs_embeds")
    if ids is not None:
        expect_ids(ids, language.embed_tokens.num_embeddings)
        embeds = language.embed_tokens(ids)
    assert embeds is not None
    if embeds.ndim != 3 or embeds.numel() == 0:
        raise ValueError(f"inputs_embeds: expected 3 dimensions, got shape {tuple(embeds.shape)}")
    return embeds


def embedded(x: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Embedded:
    """x (batch, seqlen, hidden_size) at the positions given, or counted without the padding.

    Given positions mark documents: attention stays inside of a run that goes up by one.
    """
    expect_grid("attention_mask", attention_mask, x)
    expect_grid("position_ids", position_ids, x)
    if position_ids is not None:
        return Embedded(x, position_ids[None], attention_mask, position_ids)
    if attention_mask is None:
        running = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
    else:
        running = ((attention_mask != 0).cumsum(dim=1) - 1).clamp(min=0)
    return Embedded(x, running[None], attention_mask)


def splice(name: str, x: Tensor, here: Tensor, rows: Tensor | None) -> Tensor:
    """x with `rows` (num_tokens, hidden_size) in the places that `here` (batch, seqlen) marks."""
    if rows is None:
        if looks_at(here) and here.any():  # on a GPU this would stall every text batch
            raise ValueError(f"pixel values: expected for {here.sum()} {name} tokens, got None")
        return x
    if not torch.compiler.is_compiling() and (num_tokens := int(here.sum())) != len(rows):
        raise ValueError(
            f"input_ids: expected {len(rows)} {name} tokens (one a feature), got {num_tokens}"
        )
    return x.masked_scatter(here.unsqueeze(-1), rows.to(x.dtype))


def _shift(labels: Tensor) -> Tensor:
    """Each place gets the label of the next one, the last -100."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
