"""BLIP-2: LayerNorm, GELU, patches, attention of the vision tower, cross-attention of the Q-Former.
The language model is a family of its own: OPT is supported, T5 stays as it is."""

from typing import Any

import torch
from torch import Tensor

from vlmkernels import nn
from vlmkernels.patch._family import Family
from vlmkernels.patch._swap import Swap

_READS = frozenset(
    (
        *("shape", "attention_head_size", "query", "view", "transpose", "key", "value"),
        *("ALL_ATTENTION_FUNCTIONS", "get_interface", "config", "_attn_implementation"),
        *("eager_attention_forward", "training", "attention_dropout", "scaling"),
        *("reshape", "contiguous"),
    )
)


def _cross_attention(cls: Any) -> dict[str, Any]:
    before = cls.forward

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        states = (hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask)
        dropout = self.training and self.attention_dropout
        plain = type(self.key) is type(self.value) is torch.nn.Linear  # no LoRA, not quantized
        same = self.key.weight.dtype == hidden_states.dtype
        if dropout or not plain or not same or kwargs.get("output_attentions"):
            return before(self, *states, **kwargs)
        return nn.QFormerCrossAttention.forward(self, *states, **kwargs)

    return {"forward": forward, "form": "auto", "dropout": 0.0}


def _no_cross_attention(module: Any, name: str) -> str | None:
    return None if ".crossattention." in name else "self-attention of few queries"


FAMILY = Family(
    "blip_2",
    swaps={
        "Blip2QFormerMultiHeadAttention": (
            Swap("qformer_attention", _cross_attention, _no_cross_attention, _READS),
        )
    },
    others=(
        *("Blip2VisionEmbeddings", "Blip2Attention", "Blip2MLP", "Blip2EncoderLayer"),
        *("Blip2Encoder", "Blip2TextEmbeddings", "Blip2QFormerAttention", "Blip2QFormerEncoder"),
        *("Blip2QFormerLayer", "Blip2QFormerSelfOutput", "Blip2QFormerIntermediate"),
        "Blip2QFormerOutput",
    ),
    own_attention=("Blip2QFormerModel",),
)
