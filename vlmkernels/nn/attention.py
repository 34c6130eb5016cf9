"""MultiheadAttention: drop-in for `torch.nn.MultiheadAttention(batch_first=True)`."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from vlmkernels import ops
from vlmkernels.nn._arguments import expect_positive, expect_width, typed


def _attention(*args: Any, **options: Any) -> Tensor:
    return cast(Tensor, ops.attention(*args, **options))


def _expect_mask(name: str, mask: Tensor | None, *shapes: tuple[int, ...]) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        kind = type(mask).__name__
        raise TypeError(f"MultiheadAttention: {name} must be a torch.Tensor, got {kind}")
    if not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise TypeError(
            f"MultiheadAttention: {name} must be bool or floating point, got {mask.dtype}"
        )
    if tuple(mask.shape) not in shapes:
        expected = " or ".join(map(str, shapes))
        raise ValueError(
            f"MultiheadAttention: {name} must have shape {expected}, got {tuple(mask.shape)}"
        )


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores; a bool mask hides where it is True."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)


class MultiheadAttention(torch.nn.MultiheadAttention):
    """out = out_proj(concat_h(softmax(q_h k_h^T / sqrt(head_dim)) v_h)).

    q, k, v are the projected inputs. Parameters, their initialisation and the state_dict are those
    of `torch.nn.MultiheadAttention` (it is one); attention is `ops.attention`, which never forms
    the attention weights.

    Args:
        embed_dim, num_heads: head_dim = embed_dim / num_heads is a multiple of 8 up to 256.
        dropout: 0.
        bias, kdim, vdim, device, dtype: as in torch.
        batch_first: must be True; the default is torch's, so that swapping the class never
            silently changes what a dimension means.

    Raises:
        ValueError: dropout, add_bias_kv, add_zero_attn or batch_first=False is asked for.
    """

    @typed
    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not batch_first:
            raise ValueError(
                "MultiheadAttention: batch_first must be True; transpose inputs with seqlen first"
            )
        if dropout or add_bias_kv or add_zero_attn:
            raise ValueError(
                "MultiheadAttention: dropout, add_bias_kv and add_zero_attn are not supported; "
                "use torch.nn.MultiheadAttention for them"
            )
        expect_positive(self, embed_dim=embed_dim, num_heads=num_heads)
        if embed_dim % num_heads:
            raise ValueError(
                f"MultiheadAttention: embed_dim must be a multiple of num_heads {num_heads}, "
                f"got {embed_dim}"
            )
        super().__init__(
            embed_dim, num_heads, bias=bias, kdim=kdim, vdim=vdim, batch_first=True,
            device=device, dtype=dtype,
        )  # fmt: skip

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Attends from query to key and value.

        Args:
            query: (batch, seqlen_q, embed_dim), or without batch.
            key, value: (batch, seqlen_k, kdim or vdim), or without batch.
            key_padding_mask: (batch, seqlen_k), True where a key is padding, or what is added to
                its scores. Alone, as bool, it costs nothing: padding is removed before the
                projections. A sequence of nothing but padding gives out_proj(0), where torch
                gives NaN.
            need_weights: must be False, which is the default here.
            attn_mask: (seqlen_q, seqlen_k) or (batch * num_heads, seqlen_q, seqlen_k), True where a
                key is hidden, or what is added to the scores. Ignored with is_causal=True (torch
                wants it there).
            is_causal: query i sees the keys j <= i; seqlen_q = seqlen_k.

        Returns:
            (out, None), out as query.

        Raises:
            ValueError: weights are asked for, or a mask has another shape.
            TypeError: a mask is neither bool nor floating point.
        """
        for name, x, width in (
            ("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim)
        ):  # fmt: skip
            expect_width(self, width, **{name: x})
            if x.dim() not in (2, 3) or x.dim() != query.dim():
                raise ValueError(
                    f"MultiheadAttention: {name} must have shape (batch, seqlen, width) or all "
                    f"(seqlen, width), got {tuple(x.shape)}"
                )
        attn_mask = None if is_causal else attn_mask
        self._check(query, key, key_padding_mask, need_weights, attn_mask, is_causal)
        if query.dim() == 2:
            mask = None if key_padding_mask is None else key_padding_mask[None]
            out, _ = self.forward(
                query[None], key[None], value[None], mask, attn_mask=attn_mask, is_causal=is_causal
            )
            return out[0], None
        padding = key_padding_mask
        alone = attn_mask is None and not is_causal
        if padding is not None and padding.dtype == torch.bool and alone:
            attended = self._attend_unpadded(query, key, value, ~padding)
        else:
            q, k, v = self._project(query, key, value)
            bias = self._bias(q, padding, attn_mask)
            attended = _attention(q, k, v, causal=is_causal, bias=bias)
        return self.out_proj(attended.flatten(-2)), None

    def _check(
        self,
        query: Tensor,
        key: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> None:
        if need_weights:
            raise ValueError(
                "MultiheadAttention: need_weights must be False, as weights are never formed; "
                "use torch.nn.MultiheadAttention to look at them"
            )
        if is_causal and query.shape[-2] != key.shape[-2]:
            raise ValueError(
                "MultiheadAttention: is_causal needs as many keys as queries, got "
                f"{query.shape[-2]} queries and {key.shape[-2]} keys"
            )
        batch = query.shape[0] if query.dim() == 3 else 1
        scores = (query.shape[-2], key.shape[-2])
        _expect_mask("key_padding_mask", key_padding_mask, (*key.shape[:-1],))
        _expect_mask("attn_mask", attn_mask, scores, (batch * self.num_heads, *scores))

    def _bias(self, q: Tensor, padding: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """The masks as what is added to the scores: (batch or 1, num_heads or 1, q, k)."""
        bias = None
        if mask is not None:
            heads = (len(q), self.num_heads) if mask.dim() == 3 else (1, 1)
            bias = _added(mask, q.dtype).view(*heads, *mask.shape[-2:])
        if padding is not None:
            of_keys = _added(padding, q.dtype)[:, None, None].expand(-1, -1, q.shape[1], -1)
            bias = of_keys if bias is None else bias + of_keys
        return bias

    def _attend_unpadded(self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor) -> Tensor:
        batch, seqlen_q, _ = query.shape
        q, k, v = self._project(query.flatten(0, 1), key[valid], value[valid])
        starts_q = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * seqlen_q
        starts_k = functional.pad(valid.sum(1).cumsum(0), (1, 0)).int()
        out = _attention(
            q, k, v, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k,
            max_seqlen_q=seqlen_q, max_seqlen_k=valid.shape[1],
        )  # fmt: skip
        return out.view(batch, seqlen_q, *out.shape[1:])

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., num_heads, head_dim) each; one product where the inputs are one tensor."""
        heads = (self.num_heads, self.head_dim)
        if self._qkv_same_embed_dim and query is key and key is value:
            qkv = functional.linear(query, self.in_proj_weight, self.in_proj_bias)
            q, k, v = qkv.unflatten(-1, (3, *heads)).unbind(-3)
            return q, k, v
        weights = (
            self.in_proj_weight.chunk(3)
            if self._qkv_same_embed_dim
            else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        )
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            functional.linear(x, weight, bias).unflatten(-1, heads)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        return q, k, v
