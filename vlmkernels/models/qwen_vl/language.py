"""Qwen-7B, the language model of Qwen-VL: rotary positions that stretch beyond seq_length."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vlmkernels import ops
from vlmkernels.distributed import ContextPlan
from vlmkernels.models.cache import KVCache, LayerCache
from vlmkernels.models.decoder import PackedDecoder, causal_attention
from vlmkernels.models.layers import add_norm
from vlmkernels.nn import RMSNorm

from .config import QwenVLConfig


class Turn(NamedTuple):
    """What positions do to q and k, for all layers alike."""

    cos: Tensor  # (num_tokens, head_dim / 2) fp32
    sin: Tensor
    scale: Tensor | None  # (num_tokens,) that q is multiplied by: LogN attention


class QwenAttention(nn.Module):
    """Causal attention; the fused q, k, v projection has a bias, the output one has none."""

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        turn: Turn,
        cu_seqlens: Tensor,
        max_seqlen: int,
        cache: LayerCache | None,
        plan: ContextPlan | None,
    ) -> Tensor:
        q, k, v = self.c_attn(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        q, k = ops.rope_from_tables(q, k, turn.cos, turn.sin)
        if turn.scale is not None:
            q = q * turn.scale.to(q.dtype)[:, None, None]
        y: Tensor = self.c_proj(causal_attention(q, k, v, cu_seqlens, max_seqlen, cache, plan))
        return y


class QwenMlp(nn.Module):
    """SwiGLU: c_proj(silu(w2(x)) * w1(x)); intermediate_size counts both halves."""

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__()
        half = config.intermediate_size // 2
        self.w1 = nn.Linear(config.hidden_size, half, bias=False)
        self.w2 = nn.Linear(config.hidden_size, half, bias=False)
        self.c_proj = nn.Linear(half, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c_proj(ops.swiglu(self.w2(x), self.w1(x)))
        return y


class QwenLayer(nn.Module):
    """Pre-norm layer. Takes and returns (x, residual): the next norm adds them in its kernel."""

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__()
        self.ln_1 = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = QwenAttention(config)
        self.ln_2 = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = QwenMlp(config)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        turn: Turn,
        cu_seqlens: Tensor,
        max_seqlen: int,
        cache: LayerCache | None,
        plan: ContextPlan | None,
    ) -> tuple[Tensor, Tensor]:
        y, residual = add_norm(self.ln_1, x, residual)
        y = self.attn(y, turn, cu_seqlens, max_seqlen, cache, plan)
        y, residual = add_norm(self.ln_2, y, residual)
        return self.mlp(y), residual


class QwenLanguage(PackedDecoder):
    """`PackedDecoder` of Qwen-7B.

    Outside of training (`model.eval()`), as the published code does:

    - dynamic NTK: a prompt of L > seq_length tokens turns by the angles of the base
      theta * a^(head_dim / (head_dim - 2)), a = 2^(ceil(log2(L / seq_length)) + 1) - 1. What is
      generated after it keeps the prompt's base, however long it grows.
    - LogN attention: token number n > seq_length multiplies its q by log(n) / log(seq_length).

    Both count the tokens of a sequence itself, without padding, so that a row of a batch is
    computed as it is alone.
    """

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__(config, lambda: QwenLayer(config))
        self.theta, self.seq_length = config.rotary_emb_base, config.seq_length
        self.use_dynamic_ntk, self.use_logn_attn = config.use_dynamic_ntk, config.use_logn_attn
        self.ln_f = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)

    @property
    def last_norm(self) -> RMSNorm:
        return self.ln_f

    def layer_positions(
        self,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        cache: KVCache | None,
        plan: ContextPlan | None,
    ) -> Turn:
        places = position_ids[0]
        before = cache if cache is not None and cache.decoding else None
        longest = before.length if before is not None else max_seqlen
        stretched = not self.training and longest > self.seq_length
        alpha = scale = None
        if stretched and self.use_dynamic_ntk:
            if before is None:
                lengths = _lengths(cu_seqlens, len(places), plan)
            else:
                lengths = before.prompt_seqlens
            alpha = ntk_alpha(lengths, self.seq_length)
        if stretched and self.use_logn_attn:
            scale = logn_scale(places, self.seq_length)
        cos, sin = tables(places, self.theta, self.head_dim, alpha)
        return Turn(cos, sin, scale)


def _lengths(cu_seqlens: Tensor, num_tokens: int, plan: ContextPlan | None) -> Tensor:
    """(num_tokens,) how long the sequence of each token (of this rank's, with a plan) is."""
    total = num_tokens if plan is None else plan.layout.num_tokens
    index = torch.arange(total, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    lengths = cu_seqlens.diff()[torch.searchsorted(cu_seqlens[1:], index, right=True)]
    return lengths if plan is None else plan.shard(lengths, 0)


def ntk_alpha(lengths: Tensor, seq_length: int) -> Tensor:
    """How much a prompt of so many tokens stretches the base: 1, 3, 7, ... of the same shape."""
    steps = torch.log2(lengths.double() / seq_length).ceil() + 1
    return (2**steps - 1).clamp(min=1)


def logn_scale(positions: Tensor, seq_length: int) -> Tensor:
    """log(n) / log(seq_length) for token number n = position + 1, at least 1; fp32."""
    scale = (positions + 1).double().log() / math.log(seq_length)
    return scale.clamp(min=1).float()


def tables(
    positions: Tensor, theta: float, head_dim: int, alpha: Tensor | None
) -> tuple[Tensor, Tensor]:
    """cos and sin of the angle of every pair, (num_tokens, head_dim / 2) fp32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    if alpha is None:
        inv_freq = 1 / theta ** (exponents / head_dim)
    else:
        base = (theta * alpha ** (head_dim / (head_dim - 2))).float()
        inv_freq = 1 / base[:, None] ** (exponents / head_dim)
    angles = positions[:, None].float() * inv_freq
    return angles.cos(), angles.sin()
