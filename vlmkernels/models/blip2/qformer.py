"""BLIP-2 Q-Former (arXiv 2301.12597, section 3.1): BERT whose learned queries also see an image.

Queries and words share the self-attention and nothing else. The tokens of a batch are one run, all
queries first, then all words without padding; a `Layout` says who sees whom in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlmkernels.models.encoder import Span, attend
from vlmkernels.models.layers import Dense, activation, add_norm, run_layer
from vlmkernels.models.packing import Packing
from vlmkernels.nn import LayerNorm, QFormerCrossAttention

from .config import Blip2QFormerConfig


@dataclass(frozen=True)
class Layout:
    """Self-attention over the run: `span` of it, or of run[order] where there is an order."""

    span: Span
    order: Tensor | None = None  # (num_tokens,) int64
    inverse: Tensor | None = None  # (num_tokens,) int64, its inverse permutation


def apart(batch: int, num_queries: int, packing: Packing | None, device: torch.device) -> Layout:
    """The uni-modal mask of image-text contrast: the queries of an image see themselves, the words
    of a text see themselves. Sequences side by side; either kind may be missing."""
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device) * num_queries
    longest = num_queries if batch else 0
    if packing is not None:
        starts = torch.cat([starts[:-1], packing.cu_seqlens + batch * num_queries])
        longest = max(longest, packing.max_seqlen)
    return Layout(Span(cu_seqlens=starts, max_seqlen=longest))


def joint(batch: int, num_queries: int, packing: Packing, *, causal: bool) -> Layout:
    """The queries of image i and text i in one sequence; texts beyond `batch` are alone.

    Bidirectional (image-text matching): all of a sequence see each other. Causal (image-grounded
    text generation): queries see queries, a word sees the queries and the words up to itself; a
    text that is alone stays bidirectional.
    """
    device = packing.cu_seqlens.device
    text = torch.arange(packing.batch, device=device)
    texts = packing.pack(text[:, None].expand(-1, packing.seqlen))
    queries = text[:batch].repeat_interleave(num_queries)
    order = torch.cat([queries, texts]).argsort(stable=True)
    starts = packing.cu_seqlens + num_queries * torch.arange(
        len(packing.cu_seqlens), dtype=torch.int32, device=device
    ).clamp(max=batch)
    image_ids = None
    if causal:
        word = torch.where(texts < batch, -1, 0)
        image_ids = torch.cat([torch.zeros_like(queries), word])[order].to(torch.int32)
    span = Span(causal, starts, packing.max_seqlen + num_queries, image_ids)
    return Layout(span, order, order.argsort())


class SelfAttention(nn.Module):
    def __init__(self, config: Blip2QFormerConfig) -> None:
        super().__init__()
        self.num_heads, dim = config.num_attention_heads, config.hidden_size
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        if layout.order is None or layout.inverse is None:
            return attend(x, self.query, self.key, self.value, self.num_heads, layout.span)
        x = x.index_select(0, layout.order)
        y = attend(x, self.query, self.key, self.value, self.num_heads, layout.span)
        return y.index_select(0, layout.inverse)


class Output(nn.Module):
    """y = layer_norm(residual + dropout(dense(x)))"""

    def __init__(self, in_features: int, config: Blip2QFormerConfig) -> None:
        super().__init__()
        self.dropout = config.hidden_dropout_prob
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        x = nn.functional.dropout(self.dense(x), self.dropout, self.training)
        return add_norm(self.LayerNorm, x, residual)[0]


class Attention(nn.Module):
    def __init__(self, attention: nn.Module, config: Blip2QFormerConfig) -> None:
        super().__init__()
        self.attention = attention
        self.output = Output(config.hidden_size, config)


class Layer(nn.Module):
    """Post-norm. Takes and returns the queries (batch, num_queries, hidden_size) and the words
    (num_words, hidden_size), either None where there are none."""

    def __init__(self, config: Blip2QFormerConfig, cross: bool) -> None:
        super().__init__()
        dim, mlp_dim = config.hidden_size, config.intermediate_size
        self.act: Callable[[Tensor], Tensor] = activation(config.hidden_act)
        self.attention = Attention(SelfAttention(config), config)
        self.crossattention: Attention | None = None
        if cross:
            image = QFormerCrossAttention(
                dim, config.encoder_hidden_size, config.num_attention_heads
            )
            self.crossattention = Attention(image, config)
        if config.use_qformer_text_input:
            self.intermediate, self.output = Dense(dim, mlp_dim), Output(mlp_dim, config)
        self.intermediate_query, self.output_query = Dense(dim, mlp_dim), Output(mlp_dim, config)

    def forward(
        self, queries: Tensor | None, words: Tensor | None, image: Tensor | None, layout: Layout
    ) -> tuple[Tensor | None, Tensor | None]:
        parts = [] if queries is None else [queries.flatten(0, 1)]
        parts += [] if words is None else [words]
        run = parts[0] if len(parts) == 1 else torch.cat(parts)
        run = self.attention.output(self.attention.attention(run, layout), run)
        if queries is not None:
            q = run[: len(parts[0])].view_as(queries)
            if self.crossattention is not None:
                y, _ = self.crossattention.attention(q, encoder_hidden_states=image)
                q = self.crossattention.output(y, q)
            queries = self.output_query(self.act(self.intermediate_query(q)), q)
        if words is not None:
            w = run[len(run) - len(words) :]
            words = self.output(self.act(self.intermediate(w)), w)
        return queries, words


class Encoder(nn.Module):
    def __init__(self, config: Blip2QFormerConfig) -> None:
        super().__init__()
        every = config.cross_attention_frequency
        self.layer = nn.ModuleList(
            Layer(config, i % every == 0) for i in range(config.num_hidden_layers)
        )


class QFormer(nn.Module):
    """queries (batch, num_queries, hidden_size), image (batch, num_tokens, encoder_hidden_size) and
    embedded words (num_words, hidden_size) -> what became of queries and words.

    Queries and their image, or the words, may be None. `layout` is made by `apart` or `joint`.
    """

    def __init__(self, config: Blip2QFormerConfig) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.dropout = config.hidden_dropout_prob
        self.layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = Encoder(config)

    def forward(
        self, queries: Tensor | None, image: Tensor | None, words: Tensor | None, layout: Layout
    ) -> tuple[Tensor | None, Tensor | None]:
        queries, words = self._embedded(queries), self._embedded(words)
        image = None if image is None else image.to(self.layernorm.weight.dtype)
        for layer in self.encoder.layer:
            queries, words = run_layer(
                layer, queries, words, image, layout, recompute=self.gradient_checkpointing
            )
        return queries, words

    def _embedded(self, x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        y = self.layernorm(x.to(self.layernorm.weight.dtype))
        return nn.functional.dropout(y, self.dropout, self.training)


class TextEmbeddings(nn.Module):
    """Word plus position: ids and places (num_words,) -> (num_words, hidden_size)."""

    def __init__(self, config: Blip2QFormerConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, words: Tensor, positions: Tensor) -> Tensor:
        y: Tensor = self.word_embeddings(words) + self.position_embeddings(positions)
        return y
