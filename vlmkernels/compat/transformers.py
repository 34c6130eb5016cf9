"""`attn_implementation="vlmkernels"` of transformers' models, on `ops.attention`."""

from typing import Any

import torch
from torch import Tensor

from vlmkernels import ops
from vlmkernels.compat.flash_attn import _DROPOUT, _refuse, scaled_dot_product_attention

NAME = "vlmkernels"


def register() -> None:
    """From now on `model.set_attn_implementation("vlmkernels")` and `from_pretrained(path,
    attn_implementation="vlmkernels")` know the name. Weights and their names stay as they are.

    Masks are those of "sdpa": none for a causal or a whole row without padding, else a bool tensor,
    so that padding, sliding windows, packed rows and static caches mean what they mean there.

    Raises:
        ImportError: there is no transformers.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """out = softmax(scaling query key^T + mask) value, as transformers calls it; no weights.

    Args:
        query: (batch, num_heads, seqlen_q, head_dim); key, value: (batch, num_heads_k, seqlen_k,
            head_dim), num_heads_k a divisor of num_heads.
        attention_mask: as of `scaled_dot_product_attention`; None: causal as `is_causal` or else
            the module says, one query alone sees every key.
        options: cu_seq_lens_q and cu_seq_lens_k (int32; max_length_q, max_length_k) without a
            mask: the one row is packed, each sequence sees itself.

    Returns:
        (batch, seqlen_q, num_heads, head_dim), and None.

    Raises:
        ValueError: dropout, softcap, position_bias, s_aux (sinks) or a paged cache is asked for.
    """
    for name in ("softcap", "position_bias", "s_aux", "cache"):
        if options.get(name) is not None:
            raise ValueError(f"{NAME}: {name} is not supported; use another attn_implementation")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and options.get("cu_seq_lens_q") is not None:
        _refuse(NAME, dropout=(dropout, _DROPOUT))
        return _packed(query, key, value, bool(causal), scaling, options), None
    one = query.shape[2] == 1
    if one and attention_mask is None and not dropout and not _needs_gradient(query, key, value):
        return _one_query(query, key, value, scaling), None
    out = scaled_dot_product_attention(
        *(query, key, value, attention_mask, dropout),
        is_causal=bool(causal and attention_mask is None and not one),
        scale=scaling,
        enable_gqa=True,
    )
    return out.transpose(1, 2).contiguous(), None


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _one_query(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """It sees all keys: the kernel that splits them, of the cache."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    lengths = torch.full((len(k),), k.shape[1], dtype=torch.int32, device=k.device)
    out = ops.attention_decode(q, k, v, lengths, softmax_scale=scaling)
    assert isinstance(out, Tensor)
    return out


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    scaling: float | None,
    options: dict[str, Any],
) -> Tensor:
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    out = ops.attention(
        *(q, k, v),
        causal=causal,
        softmax_scale=scaling,
        cu_seqlens_q=options["cu_seq_lens_q"],
        cu_seqlens_k=options.get("cu_seq_lens_k"),
        max_seqlen_q=options.get("max_length_q"),
        max_seqlen_k=options.get("max_length_k"),
    )
    assert isinstance(out, Tensor)
    return out.unsqueeze(0)
