"""T5 and FlanT5 (arXiv 1910.10683, 2210.11416), encoder and decoder on packed tokens; no dropout.

Pre-norm layers with RMSNorm and no bias. Attention does not scale its scores; one table of biases
by relative position, of the first layer of each stack, is added in all of them. FlanT5 (T5 v1.1):
gated tanh-GELU, a head of its own. The first T5: ReLU, the head is the embedding scaled by
d_model^-0.5. The published FlanT5 weights overflow in float16: bfloat16 is for them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from vlmkernels import ops
from vlmkernels.models.cache import KVCache, LayerCache
from vlmkernels.models.decoder import next_token_loss
from vlmkernels.models.layers import add_norm, run_layer
from vlmkernels.models.packing import Packing, expect_grid, expect_no_empty_row, make_packing
from vlmkernels.models.vlm import VLMOutput, expect_ids, expect_labels
from vlmkernels.nn import RMSNorm
from vlmkernels.ops import attention, attention_decode

from .config import T5Config


def relative_buckets(distance: Tensor, *, causal: bool, count: int, max_distance: int) -> Tensor:
    """The row of the table for key position - query position: one each for small distances, then
    ever wider ones up to max_distance. Bidirectional: half of them for each direction."""
    bucket = torch.zeros_like(distance)
    if causal:
        distance = (-distance).clamp(min=0)
    else:
        count //= 2
        bucket = (distance > 0) * count
        distance = distance.abs()
    exact = count // 2
    # In the order of the published code: buckets must not move by a rounding.
    wide = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    wide = (exact + (wide * (count - exact)).long()).clamp(max=count - 1)
    bucket += torch.where(distance < exact, distance, wide)
    return bucket


@dataclass(frozen=True)
class Memory:
    """What the encoder made of a batch: packed x (num_tokens, d_model) without padding."""

    x: Tensor
    packing: Packing


@dataclass
class T5State:
    """What decoding carries from step to step."""

    cache: KVCache  # keys and values of the new tokens, for self-attention
    memory: KVCache  # those of each prompt, for cross-attention: once, however many rows share it
    bias: Tensor  # (1, num_heads, 1, max_new_tokens) of the newest query, its own key at the end

    def select(self, rows: Tensor) -> None:
        """See `beam_search.Rows`; rows of a prompt stay together, so its memory stays."""
        self.cache.select(rows)


class T5Attention(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.num_heads, inner_dim = config.num_heads, config.num_heads * config.d_kv
        self.q, self.k, self.v = (
            nn.Linear(config.d_model, inner_dim, bias=False) for _ in range(3)
        )
        self.o = nn.Linear(inner_dim, config.d_model, bias=False)

    def heads(self, proj: nn.Linear, x: Tensor) -> Tensor:
        """(num_tokens, d_model) -> (num_tokens, num_heads, d_kv)"""
        y: Tensor = proj(x).unflatten(-1, (self.num_heads, -1))
        return y

    def merge(self, out: Any, num_tokens: int) -> Tensor:
        y: Tensor = self.o(cast(Tensor, out).reshape(num_tokens, self.o.in_features))
        return y


class T5SelfAttention(T5Attention):
    """softmax(q k^T + bias) v, causal in the decoder; bias (1, num_heads, seqlen_q, seqlen_k)."""

    def __init__(self, config: T5Config, *, causal: bool, has_table: bool) -> None:
        super().__init__(config)
        self.causal = causal
        self.max_distance = config.relative_attention_max_distance
        if has_table:
            self.relative_attention_bias = nn.Embedding(
                config.relative_attention_num_buckets, config.num_heads
            )

    def forward(
        self, x: Tensor, bias: Tensor, packing: Packing, cache: LayerCache | None
    ) -> Tensor:
        q, k, v = (self.heads(proj, x) for proj in (self.q, self.k, self.v))
        if cache is None:
            out = attention(
                *(q, k, v),
                causal=self.causal,
                softmax_scale=1.0,
                bias=bias,
                cu_seqlens_q=packing.cu_seqlens,
                max_seqlen_q=packing.max_seqlen,
            )
        else:  # one new token a row, all rows equally long
            cache.write(k, v)
            k, v = (kept[:, : bias.shape[-1]] for kept in (cache.keys, cache.values))
            out = attention(q.unsqueeze(1), k, v, softmax_scale=1.0, bias=bias)
        return self.merge(out, len(x))

    def relative_bias(self, seqlen_q: int, seqlen_k: int) -> Tensor:
        """(1, num_heads, seqlen_q, seqlen_k), for the last seqlen_q of seqlen_k positions."""
        table = self.relative_attention_bias
        distance = torch.arange(1 - seqlen_k, seqlen_q, device=table.weight.device)
        buckets = relative_buckets(
            distance,
            causal=self.causal,
            count=table.num_embeddings,
            max_distance=self.max_distance,
        )
        # (num_heads, distance): each query sees a window of it, one further to the left.
        values: Tensor = table(buckets)
        return values.T.unfold(1, seqlen_k, 1).flip(1).unsqueeze(0)


class T5CrossAttention(T5Attention):
    """softmax(q k^T) v over the encoder's tokens of the same row."""

    def forward(
        self, x: Tensor, memory: Memory | None, packing: Packing, cache: LayerCache | None
    ) -> Tensor:
        q = self.heads(self.q, x)
        if cache is None:
            assert memory is not None
            out = attention(
                *(q, *self.keys_values(memory.x)),
                softmax_scale=1.0,
                cu_seqlens_q=packing.cu_seqlens,
                cu_seqlens_k=memory.packing.cu_seqlens,
                max_seqlen_q=packing.max_seqlen,
                max_seqlen_k=memory.packing.max_seqlen,
            )
        else:  # the rows of a prompt are its queries
            q = q.unflatten(0, (len(cache.keys), -1))
            out = attention_decode(
                *(q, cache.keys, cache.values, cache.seqlens), causal=False, softmax_scale=1.0
            )
        return self.merge(out, len(x))

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.heads(self.k, x), self.heads(self.v, x)


class T5FeedForward(nn.Module):
    """wo(gelu(wi_0(x)) * wi_1(x)), or wo(relu(wi(x)))."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.gated = config.feed_forward_proj == "gated-gelu"
        self.approximate = "none" if config.dense_act_fn == "gelu" else "tanh"
        if self.gated:
            self.wi_0, self.wi_1 = (
                nn.Linear(config.d_model, config.d_ff, bias=False) for _ in range(2)
            )
        else:
            self.wi = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            h = ops.geglu(self.wi_0(x), self.wi_1(x), approximate=self.approximate)
        else:
            h = nn.functional.relu(self.wi(x))
        y: Tensor = self.wo(h)
        return y


class Sublayer(nn.Module):
    """h = x + residual; returns (module(norm(h), ...), h): the next norm adds them in its kernel.

    `name` is what published files call the module.
    """

    def __init__(self, name: str, module: nn.Module, config: T5Config) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, module)
        self.layer_norm = RMSNorm(config.d_model, eps=config.layer_norm_epsilon)

    @property
    def module(self) -> Any:
        return getattr(self, self.name)

    def forward(self, x: Tensor, residual: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
        y, residual = add_norm(self.layer_norm, x, residual)
        return self.module(y, *args), residual


class T5Block(nn.Module):
    """Self-attention, in the decoder cross-attention, feed-forward."""

    def __init__(self, config: T5Config, *, decoder: bool, first: bool) -> None:
        super().__init__()
        self_attention = T5SelfAttention(config, causal=decoder, has_table=first)
        self.layer = nn.ModuleList([Sublayer("SelfAttention", self_attention, config)])
        if decoder:
            self.layer.append(Sublayer("EncDecAttention", T5CrossAttention(config), config))
        self.layer.append(Sublayer("DenseReluDense", T5FeedForward(config), config))

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        bias: Tensor,
        packing: Packing,
        memory: Memory | None,
        cache: LayerCache | None,
        memory_cache: LayerCache | None,
    ) -> tuple[Tensor, Tensor]:
        attend, *cross, feed_forward = self.layer
        x, residual = attend(x, residual, bias, packing, cache)
        for sublayer in cross:
            x, residual = sublayer(x, residual, memory, packing, memory_cache)
        x, residual = feed_forward(x, residual)
        return x, cast(Tensor, residual)


class T5Stack(nn.Module):
    """Packed embeddings (num_tokens, d_model) -> normed hidden states of the same shape.

    The decoder attends to `memory`; or takes a step (one token a row) with what `state` keeps.
    """

    def __init__(self, config: T5Config, num_layers: int, *, decoder: bool) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.block = nn.ModuleList(
            T5Block(config, decoder=decoder, first=i == 0) for i in range(num_layers)
        )
        self.final_layer_norm = RMSNorm(config.d_model, eps=config.layer_norm_epsilon)

    def relative_bias(self, seqlen_q: int, seqlen_k: int) -> Tensor:
        """(1, num_heads, seqlen_q, seqlen_k): the same in all layers, computed once."""
        first: Any = self.block[0]
        bias: Tensor = first.layer[0].module.relative_bias(seqlen_q, seqlen_k)
        return bias

    def forward(
        self,
        x: Tensor,
        packing: Packing,
        memory: Memory | None = None,
        state: T5State | None = None,
    ) -> Tensor:
        if state is None:
            bias = self.relative_bias(packing.max_seqlen, packing.max_seqlen)
        else:
            bias = state.bias[..., -state.cache.length :]
        residual = None
        for i, block in enumerate(self.block):
            x, residual = run_layer(
                block,
                *(x, residual, bias, packing, memory),
                state.cache.layers[i] if state is not None else None,
                state.memory.layers[i] if state is not None else None,
                recompute=self.gradient_checkpointing,
            )
        y, _ = add_norm(self.final_layer_norm, x, residual)
        return y


class T5Language(nn.Module):
    """Encoder, decoder and head under the published names, for whatever embeddings come in.

    Padding never reaches a kernel. Training: `forward`. Generation: `encode`, `start`, then `step`.
    Inside of `context_parallel` every rank still computes the whole batch.
    """

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        num_decoder_layers = config.num_decoder_layers or config.num_layers
        self.encoder = T5Stack(config, config.num_layers, decoder=False)
        self.decoder = T5Stack(config, num_decoder_layers, decoder=True)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    @property
    def embed_tokens(self) -> nn.Embedding:
        return self.shared

    def encode(self, x: Tensor, attention_mask: Tensor | None = None) -> Memory:
        """x (batch, seqlen, d_model) -> the encoder's packed output.

        attention_mask: (batch, seqlen), 0 on padding, on either side. Raises ValueError for
        padding between tokens, which would have to count as distance, and for a row of it.
        """
        packing = _pack_rows("attention_mask", x, attention_mask)
        return Memory(self.encoder(packing.pack(x), packing), packing)

    def forward(
        self,
        memory: Memory,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> VLMOutput:
        """Logits of what comes after every decoder token and, with labels, the loss.

        Args:
            memory: of `encode`.
            decoder_input_ids: (batch, seqlen); by default labels, shifted right by one behind
                config.decoder_start_token_id.
            decoder_attention_mask: (batch, seqlen), 0 on padding, on either side.
            labels: (batch, seqlen), not shifted: what decoder_input_ids are to be followed by;
                -100 does not count.
            num_items_in_batch: divides the summed loss instead of the number of labels.
        """
        if labels is not None:
            expect_labels(labels, labels, self.config.vocab_size)
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("decoder_input_ids: expected them or labels, got neither")
            decoder_input_ids = self.shift_right(labels)
        expect_ids(decoder_input_ids, self.config.vocab_size, "decoder_input_ids")
        x = self.shared(decoder_input_ids)
        if len(x) != memory.packing.batch:
            raise ValueError(
                f"decoder_input_ids: expected {memory.packing.batch} rows, got {len(x)}"
            )
        expect_grid("labels", labels, x)
        packing = _pack_rows("decoder_attention_mask", x, decoder_attention_mask)
        logits = self.head(self.decoder(packing.pack(x), packing, memory))
        loss = None
        if labels is not None:
            loss = next_token_loss(logits, packing.pack(labels), num_items_in_batch)
        return VLMOutput(packing.unpack(logits), loss)

    def shift_right(self, labels: Tensor) -> Tensor:
        """The decoder's input for labels (batch, seqlen): start token in front, the last one off,
        padding for -100."""
        start, pad = self.config.decoder_start_token_id, self.config.pad_token_id
        if start is None or pad is None:
            raise ValueError("decoder_start_token_id, pad_token_id: expected both, got null")
        shifted = nn.functional.pad(labels[:, :-1], (1, 0), value=start)
        return shifted.masked_fill(shifted == -100, pad)

    @torch.inference_mode()
    def start(self, memory: Memory, max_new_tokens: int) -> tuple[Tensor, T5State]:
        """Logits (batch, vocab_size) of the first token of the answer, and room for all of it."""
        x, batch, layers = memory.x, memory.packing.batch, self.decoder.block
        size = (self.config.num_heads, self.config.d_kv)
        cache, kept = (
            KVCache(len(layers), batch, seqlen, *size, dtype=x.dtype, device=x.device)
            for seqlen in (max_new_tokens, memory.packing.max_seqlen)
        )
        kept.start(memory.packing)
        for block, layer in zip(layers, kept.layers, strict=True):
            layer.write(*cast(Any, block).layer[1].module.keys_values(x))
        state = T5State(cache, kept, self.decoder.relative_bias(1, max_new_tokens))
        return self.step(self.start_tokens(batch, x.device), state), state

    @torch.inference_mode()
    def step(self, tokens: Tensor, state: T5State) -> Tensor:
        """One more token (batch,) of every row -> logits (batch, vocab_size) of the next."""
        state.cache.advance()
        packing = make_packing(len(tokens), 1, tokens.device)
        return self.head(self.decoder(self.shared(tokens), packing, state=state))

    def start_tokens(self, batch: int, device: torch.device) -> Tensor:
        """(batch,) of decoder_start_token_id"""
        start = self.config.decoder_start_token_id
        if start is None:
            raise ValueError("decoder_start_token_id: expected an integer, got null")
        return torch.full((batch,), start, dtype=torch.int64, device=device)

    def head(self, h: Tensor) -> Tensor:
        """(..., d_model) -> (..., vocab_size)"""
        if self.config.tie_word_embeddings:
            return nn.functional.linear(h * self.config.d_model**-0.5, self.shared.weight)
        logits: Tensor = self.lm_head(h)
        return logits

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As published: scores of unscaled attention start out with a variance near 1."""
        dim, d_kv, num_heads = self.config.d_model, self.config.d_kv, self.config.num_heads
        fan_in = {"q": dim * d_kv, "o": num_heads * d_kv, "wo": self.config.d_ff}
        for name, parameter in self.named_parameters():
            leaf = name.split(".")[-2]
            if leaf.endswith("layer_norm"):
                parameter.fill_(1.0)
            else:
                one = leaf in ("shared", "lm_head")
                parameter.normal_(std=1.0 if one else fan_in.get(leaf, dim) ** -0.5)


def _pack_rows(name: str, x: Tensor, mask: Tensor | None) -> Packing:
    """The packing of x (batch, seqlen, d_model), in whose rows no padding is between tokens."""
    expect_grid(name, mask, x)
    packing = make_packing(x.shape[0], x.shape[1], x.device, mask)
    if packing.indices is not None:
        expect_no_empty_row(packing)
        gaps = packing.indices.diff() != 1
        gaps[packing.cu_seqlens[1:-1] - 1] = False
        if bool(gaps.any()):
            raise ValueError(f"{name}: expected padding at the ends of a row, got it in between")
    return packing
