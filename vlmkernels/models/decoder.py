"""Decoder-only language models on packed tokens; `Decoder` is LLaMA and Qwen2 (GQA, SwiGLU,
RMSNorm, rotary), vlmkernels/models/opt.py another one.

There is no padding and no mask here: a batch is one run of tokens, `cu_seqlens` marks where each
sequence starts (vlmkernels/models/packing.py).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn

from vlmkernels.distributed import ContextPlan, ring_attention
from vlmkernels.models.cache import KVCache, LayerCache
from vlmkernels.models.layers import GatedMlp, add_norm, run_layer
from vlmkernels.nn import LayerNorm, RMSNorm
from vlmkernels.ops import attention, attention_decode


class Rotary(Protocol):
    def __call__(self, q: Tensor, k: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """q, k (num_tokens, heads, head_dim) turned by position_ids (..., num_tokens)."""


class StackConfig(Protocol):
    """What every decoder wants to know; the config of a model has it under these names."""

    hidden_size: int
    num_hidden_layers: int
    vocab_size: int

    @property
    def num_heads(self) -> int: ...
    @property
    def num_heads_k(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


class DecoderConfig(StackConfig, Protocol):
    """What `Decoder` wants to know besides."""

    hidden_act: str
    intermediate_size: int
    rms_norm_eps: float


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    cache: LayerCache | None,
    plan: ContextPlan | None,
) -> Tensor:
    """q (num_tokens, num_heads, head_dim); k, v alike -> (num_tokens, num_heads * head_dim).

    Keys and values go to the `cache`, if there is one; see `PackedDecoder`.
    """
    if cache is not None:
        cache.write(k, v)
    if cache is not None and cache.decoding:
        out = attention_decode(q.unsqueeze(1), cache.keys, cache.values, cache.seqlens)
    elif plan is not None:
        out = ring_attention(q, k, v, plan)
    else:
        out = attention(q, k, v, causal=True, cu_seqlens_q=cu_seqlens, max_seqlen_q=max_seqlen)
    return cast(Tensor, out).reshape(len(q), q.shape[1] * q.shape[2])


class Attention(nn.Module):
    """Causal grouped-query attention; q, k, v projections with `bias`, the output one without."""

    def __init__(self, config: DecoderConfig, rotary: Rotary, bias: bool) -> None:
        super().__init__()
        self.head_dim, self.rotary = config.head_dim, rotary
        q_dim, kv_dim = config.num_heads * self.head_dim, config.num_heads_k * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_dim, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_dim, bias=bias)
        self.o_proj = nn.Linear(q_dim, config.hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        cache: LayerCache | None,
        plan: ContextPlan | None,
    ) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim))
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.rotary(q, k, position_ids)
        y: Tensor = self.o_proj(causal_attention(q, k, v, cu_seqlens, max_seqlen, cache, plan))
        return y


class DecoderLayer(nn.Module):
    """Pre-norm layer. Takes and returns (x, residual): the next norm adds them in its kernel."""

    def __init__(self, config: DecoderConfig, rotary: Rotary, bias: bool) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, rotary, bias)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = GatedMlp(
            config.hidden_size, config.intermediate_size, config.hidden_act, bias=False
        )

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        cache: LayerCache | None,
        plan: ContextPlan | None,
    ) -> tuple[Tensor, Tensor]:
        y, residual = add_norm(self.input_layernorm, x, residual)
        y = self.self_attn(y, position_ids, cu_seqlens, max_seqlen, cache, plan)
        y, residual = add_norm(self.post_attention_layernorm, y, residual)
        return self.mlp(y), residual


class PackedDecoder(nn.Module):
    """Token embeddings (num_tokens, hidden_size) -> normed hidden states of the same shape.

    position_ids: (num_axes, num_tokens); the layers get them, one axis as (num_tokens,).
    cu_seqlens: (num_sequences + 1,) int32. With a `cache` the new keys and values go where it
    reserved, and a decoding step (one token per row) attends to the whole cache. With a `plan` the
    tokens are this rank's, and attention goes over all ranks.
    """

    num_axes: ClassVar[int] = 1
    max_positions: int | None = None  # None: no table of positions to run out of

    def __init__(self, config: StackConfig, make_layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.num_heads_k, self.head_dim = config.num_heads_k, config.head_dim
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(make_layer() for _ in range(config.num_hidden_layers))

    @property
    @abstractmethod
    def last_norm(self) -> RMSNorm | LayerNorm:
        """Of the hidden states after the layers."""

    def add_positions(self, x: Tensor, position_ids: Tensor) -> Tensor:
        """x before the first layer, for positions that are not a matter of attention."""
        return x

    def layer_positions(
        self,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        cache: KVCache | None,
        plan: ContextPlan | None,
    ) -> Any:
        """What the layers get to know of the positions."""
        return position_ids[0] if self.num_axes == 1 else position_ids

    def forward(
        self,
        x: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        cache: KVCache | None = None,
        plan: ContextPlan | None = None,
    ) -> Tensor:
        residual = None
        positions = self.layer_positions(position_ids, cu_seqlens, max_seqlen, cache, plan)
        x = self.add_positions(x, positions)
        for i, layer in enumerate(self.layers):
            x, residual = run_layer(
                layer,
                *(x, residual, positions, cu_seqlens, max_seqlen),
                cache.layers[i] if cache is not None else None,
                plan,
                recompute=self.gradient_checkpointing,
            )
        y, _ = add_norm(self.last_norm, x, residual)
        return y


class Decoder(PackedDecoder):
    """LLaMA, Qwen2: rotary positions, q, k, v with `bias`."""

    def __init__(self, config: DecoderConfig, rotary: Rotary, *, bias: bool) -> None:
        super().__init__(config, lambda: DecoderLayer(config, rotary, bias))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    @property
    def last_norm(self) -> RMSNorm:
        return self.norm


def next_token_loss(
    logits: Tensor, targets: Tensor, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """Cross entropy of logits (num_tokens, vocab_size) in fp32 against targets (num_tokens,).

    Targets of -100 do not count. The mean is over those that do (0 when there are none), or over
    `num_items_in_batch`, so that gradient accumulation can weigh every token alike.
    """
    total = nn.functional.cross_entropy(
        logits.float(), targets.long(), ignore_index=-100, reduction="sum"
    )
    if num_items_in_batch is None:
        return total / (targets != -100).sum().clamp(min=1)
    return total / torch.as_tensor(num_items_in_batch, device=total.device)
