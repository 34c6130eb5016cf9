"""QFormerCrossAttention of BLIP-2 and InstructBLIP, Resampler of Qwen-VL: learned queries that
attend to image tokens."""

from math import isqrt
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, linear

from vlmkernels import ops
from vlmkernels.nn._arguments import expect_tensors, expect_width, typed
from vlmkernels.nn.norm import LayerNorm
from vlmkernels.ops.qformer_attention import FORMS


class QFormerCrossAttention(torch.nn.Module):
    """out = concat_h(softmax(q_h k_h^T / sqrt(head_dim)) v_h), q projected from hidden_states, k
    and v from encoder_hidden_states: `ops.qformer_attention` with parameters.

    Drop-in for the cross-attention of transformers' Q-Formers (`Blip2QFormerMultiHeadAttention`,
    `InstructBlipQFormerMultiHeadAttention` with is_cross_attention=True): same state_dict, same
    call; attention weights are never formed, and None stands in their place.

    Args:
        hidden_size: width of the queries and of the output.
        encoder_hidden_size: width of the image tokens.
        num_attention_heads: divides hidden_size.
        dropout: of the attention weights in training, where it must be 0: forward refuses it.
        form: as in `ops.qformer_attention`.

    Raises:
        ValueError: num_attention_heads does not divide hidden_size.
    """

    @typed
    def __init__(
        self,
        hidden_size: int,
        encoder_hidden_size: int,
        num_attention_heads: int,
        *,
        dropout: float = 0.0,
        form: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_attention_heads < 1 or hidden_size % num_attention_heads:
            raise ValueError(
                "QFormerCrossAttention: num_attention_heads must divide hidden_size "
                f"({hidden_size}), got {num_attention_heads}"
            )
        if hidden_size < 1 or encoder_hidden_size < 1 or not 0 <= dropout <= 1:
            raise ValueError(
                "QFormerCrossAttention: widths must be positive and dropout in [0, 1], got "
                f"{hidden_size}, {encoder_hidden_size} and {dropout}"
            )
        if form not in FORMS:
            raise ValueError(f"QFormerCrossAttention: form must be one of {FORMS}, got {form!r}")
        self.num_attention_heads = num_attention_heads
        self.dropout, self.form = dropout, form
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.query = torch.nn.Linear(hidden_size, hidden_size, **like)
        self.key = torch.nn.Linear(encoder_hidden_size, hidden_size, **like)
        self.value = torch.nn.Linear(encoder_hidden_size, hidden_size, **like)

    @classmethod
    def from_attention(cls, attention: Any) -> "QFormerCrossAttention":
        """The same attention, sharing the parameters of a transformers module."""
        module = cls.__new__(cls)
        torch.nn.Module.__init__(module)
        module.num_attention_heads = attention.num_attention_heads
        module.dropout = _dropout(attention)
        module.form = "auto"
        module.query, module.key, module.value = attention.query, attention.key, attention.value
        return module.train(attention.training)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """Attends from the queries to the image tokens.

        Args:
            hidden_states: (batch, num_queries, hidden_size); batch may be 1.
            attention_mask: of the queries among themselves; not used, as in transformers.
            encoder_hidden_states: (batch, num_tokens, encoder_hidden_size); batch may be 1.
            encoder_attention_mask: which tokens exist: (batch, num_tokens), not 0 where one does;
                or what transformers makes of it, (batch, 1, 1 or num_queries, num_tokens), all
                rows alike: True, or 0 to be added, where one does.
            options: those of transformers' TransformersKwargs. None and False always pass; what
                would change the result is an error, what its eager attention ignores is ignored.

        Returns:
            (out, None), out as hidden_states.

        Raises:
            ValueError: no encoder_hidden_states, a mask of another shape, dropout in training,
                output_attentions and other options that cannot be. TypeError: unknown options.
        """
        _check_options(options)
        x = encoder_hidden_states
        if x is None:
            raise ValueError("QFormerCrossAttention: encoder_hidden_states must be given, got None")
        expect_tensors(self, hidden_states=hidden_states, encoder_hidden_states=x)
        if self.training and self.dropout:
            raise ValueError(
                "QFormerCrossAttention: dropout must be 0 in training (attention_probs_dropout_prob"
                f" of the config), got {self.dropout}"
            )
        for name, tokens, width in (
            ("hidden_states", hidden_states, self.query.in_features),
            ("encoder_hidden_states", x, self.key.in_features),
        ):
            if tokens.ndim != 3 or tokens.shape[-1] != width:
                raise ValueError(
                    f"QFormerCrossAttention: {name} must have shape (batch, tokens, {width}), got "
                    f"{tuple(tokens.shape)}"
                )
        q = self.query(hidden_states).unflatten(-1, (self.num_attention_heads, -1))
        if len(x) == 1:
            x = x.expand(len(q), -1, -1)
        out = ops.qformer_attention(
            q, x, self.key.weight, self.value.weight, self.key.bias, self.value.bias,
            key_mask=_key_mask(encoder_attention_mask, x), form=self.form,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out.flatten(2), None

    def extra_repr(self) -> str:
        return f"num_attention_heads={self.num_attention_heads}, form={self.form!r}"


# Of transformers' TransformersKwargs: those that cannot be followed; those that mean
# nothing to an attention.
_REFUSED = {
    "output_attentions": "attention weights are never formed",
    "is_causal": "image tokens have no order",
    **dict.fromkeys(
        ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"),
        "packed sequences are not supported, give encoder_attention_mask",
    ),
}
_IGNORED = ("num_items_in_batch", "output_hidden_states", "output_router_logits", "position_ids")


def _check_options(options: dict[str, Any]) -> None:
    for name, value in options.items():
        if name not in _REFUSED and name not in _IGNORED:
            raise TypeError(f"QFormerCrossAttention: unexpected keyword argument {name!r}")
        if name in _REFUSED and value is not None and value is not False:
            raise ValueError(f"QFormerCrossAttention: {name} must be None: {_REFUSED[name]}")


def _dropout(attention: torch.nn.Module) -> float:
    """transformers has kept it as a number and as a module."""
    for name in ("attention_dropout", "dropout"):
        value = getattr(attention, name, None)
        if isinstance(value, torch.nn.Dropout):
            return value.p
        if value is not None:
            return float(value)
    return 0.0


def _key_mask(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Bool (batch, num_tokens), True where a token exists."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(
            "QFormerCrossAttention: encoder_attention_mask must be a torch.Tensor, got "
            f"{type(mask).__name__}"
        )
    shape, wanted = mask.shape, x.shape[:2]
    if mask.ndim == 4 and shape[1] == 1 and shape[2]:
        mask = mask[:, 0, 0]
        mask = mask if mask.dtype == torch.bool else mask == 0
    if mask.ndim != 2 or mask.shape[1] != wanted[1] or len(mask) not in (1, wanted[0]):
        raise ValueError(
            "QFormerCrossAttention: encoder_attention_mask must have shape (batch, num_tokens) = "
            f"{tuple(wanted)} or (batch, 1, num_queries, num_tokens), got {tuple(shape)}"
        )
    return (mask != 0).expand(wanted)


class Resampler(torch.nn.Module):
    """out = out_proj(attention(W_q (ln_q(query) + pos), W_k (y + pos'), W_v y)),
    y = ln_kv(kv_proj(x)): grid_size**2 learned queries summarise an image.

    Drop-in for Qwen-VL's `Resampler` (visual.attn_pool), same state_dict: query, pos_embed,
    kv_proj.weight, ln_q, ln_kv, attn.in_proj_weight, attn.in_proj_bias, attn.out_proj. pos are 2-D
    sine and cosine positions of the queries' grid; pos' the same, interpolated to x's.

    Args:
        grid_size: queries along each side.
        embed_dim: a multiple of 4.
        num_heads: embed_dim / num_heads is a multiple of 8 up to 256.
        kv_dim: width of x; kv_proj maps it to embed_dim where that is another, without a bias.
        eps: of the norms.

    Source: Bai et al., "Qwen-VL", 2023, section 2.1.
    """

    @typed
    def __init__(
        self,
        grid_size: int,
        embed_dim: int,
        num_heads: int,
        kv_dim: int | None = None,
        *,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if grid_size < 1 or (kv_dim is not None and kv_dim < 1):
            raise ValueError(
                f"Resampler: grid_size and kv_dim must be positive, got {grid_size} and {kv_dim}"
            )
        if embed_dim < 4 or embed_dim % 4 or num_heads < 1 or embed_dim % num_heads:
            raise ValueError(
                "Resampler: embed_dim must be a multiple of 4 and of num_heads, got "
                f"{embed_dim} and {num_heads}"
            )
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.pos_embed = torch.nn.Parameter(
            sincos_positions(grid_size, embed_dim).to(**like), requires_grad=False
        )
        self.query = torch.nn.Parameter(torch.empty(grid_size**2, embed_dim, **like))
        torch.nn.init.trunc_normal_(self.query, std=0.02)
        self.kv_proj = (
            torch.nn.Identity()
            if kv_dim in (None, embed_dim)
            else torch.nn.Linear(int(kv_dim or 0), embed_dim, bias=False, **like)
        )
        # Gives the parameters only.
        self.attn = torch.nn.MultiheadAttention(embed_dim, num_heads, **like)
        self.ln_q = LayerNorm(embed_dim, eps=eps, **like)
        self.ln_kv = LayerNorm(embed_dim, eps=eps, **like)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, num_tokens, kv_dim), num_tokens a square; or equal to the number of queries.

        Returns (batch, grid_size**2, embed_dim).
        """
        width = self.attn.embed_dim
        expect_width(self, getattr(self.kv_proj, "in_features", width), x=x)
        if x.ndim != 3:
            shape = "(batch, num_tokens, kv_dim)"
            raise ValueError(f"Resampler: x must have shape {shape}, got {tuple(x.shape)}")
        y = self.ln_kv(self.kv_proj(x))
        weight_q, weight_k, weight_v = self.attn.in_proj_weight.chunk(3)
        bias_q, bias_k, bias_v = self.attn.in_proj_bias.chunk(3)
        q = linear(self.ln_q(self.query) + self.pos_embed, weight_q, bias_q)
        out = ops.qformer_attention(
            q.unflatten(-1, (self.attn.num_heads, -1))[None], y, weight_k, weight_v, bias_k, bias_v,
            key_pos=interpolated(self.pos_embed, x.shape[1]),
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return self.attn.out_proj(out.flatten(2))  # type: ignore[no-any-return]


def sincos_positions(grid_size: int, dim: int) -> Tensor:
    """(grid_size**2, dim): sines and cosines of the column in the first half, of the row in the
    second, of frequencies 10000^(-4 i / dim); computed in float64."""
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    row, column = torch.meshgrid(*[torch.arange(grid_size, dtype=torch.float64)] * 2, indexing="ij")
    parts = [place.flatten()[:, None] * omega for place in (column, row)]
    return torch.cat([f(part) for part in parts for f in (torch.sin, torch.cos)], 1).float()


def interpolated(pos_embed: Tensor, num_tokens: int) -> Tensor:
    """Positions of a square grid (num_positions, dim), bicubic for one of num_tokens.

    Raises ValueError when num_tokens is another number and no square.
    """
    if len(pos_embed) == num_tokens:
        return pos_embed
    source, target = isqrt(len(pos_embed)), isqrt(num_tokens)
    if target**2 != num_tokens:
        raise ValueError(f"Resampler: x must have a square number of tokens, got {num_tokens}")
    grid = pos_embed.float().unflatten(0, (source, source)).permute(2, 0, 1)[None]
    grid = interpolate(grid, (target, target), mode="bicubic", align_corners=False)
    return grid[0].permute(1, 2, 0).flatten(0, 1).to(pos_embed.dtype)
