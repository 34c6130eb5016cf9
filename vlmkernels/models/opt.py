"""OPT (arXiv 2205.01068), the language model of BLIP-2's smaller half, on packed tokens.

Pre-norm layers with LayerNorm, ReLU and a bias everywhere; learned positions. No dropout.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from vlmkernels.models.checkpoint import Json
from vlmkernels.models.decoder import PackedDecoder, causal_attention
from vlmkernels.models.fields import INDICES, NOT_NEGATIVE, AttentionHeads, expect_fields, preset_of
from vlmkernels.models.layers import add_norm
from vlmkernels.models.vlm import VLM, Embedded, VLMOutput, embed_text, embedded, looks_at
from vlmkernels.nn import LayerNorm

# The first two rows of the position table are never used: fairseq's padding symbols.
OFFSET = 2
# What this module computes; another value in a config file is refused.
_COMPUTED: Json = {
    "do_layer_norm_before": True,  # False in OPT-350m only
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "_remove_final_layer_norm": False,
    "activation_function": "relu",
}
# Published sizes (hub config.json files): name -> fields that differ from OPT-125m's.
PRESETS: dict[str, Json] = {
    "2.7B": {
        "hidden_size": 2560,
        "ffn_dim": 10240,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "6.7B": {
        "hidden_size": 4096,
        "ffn_dim": 16384,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
}


@dataclass
class OPTConfig(AttentionHeads):
    """config.json of an OPT, or the `text_config` of a BLIP-2. Defaults are OPT-125m, which is what
    a sparse file leaves out. `raw` is the file it came from: unknown keys survive a round trip."""

    vocab_size: int = 50272
    hidden_size: int = 768
    num_hidden_layers: int = 12
    ffn_dim: int = 3072
    max_position_embeddings: int = 2048
    num_attention_heads: int = 12
    init_std: float = 0.02
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 1
    bos_token_id: int | None = 2
    eos_token_id: int | list[int] | None = 2
    raw: Json = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        expect_fields(self, eos_token_id=INDICES, init_std=NOT_NEGATIVE)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size: expected a multiple of {self.num_attention_heads} heads, "
                f"got {self.hidden_size}"
            )

    @property
    def initializer_range(self) -> float:
        return self.init_std

    @classmethod
    def preset(cls, name: str) -> OPTConfig:
        """A published size: "2.7B" or "6.7B"."""
        return cls(**preset_of(PRESETS, name))

    @classmethod
    def from_dict(cls, raw: Json) -> OPTConfig:
        """ValueError naming the key that asks for what is not computed here."""
        names = {f.name for f in dataclasses.fields(cls)} - {"raw"}
        config = cls(**{k: raw[k] for k in names & raw.keys()}, raw=copy.deepcopy(raw))
        if (kind := raw.get("model_type", "opt")) != "opt":
            raise ValueError(f"model_type: expected opt, got {kind!r}")
        for name, value in (_COMPUTED | {"word_embed_proj_dim": config.hidden_size}).items():
            if raw.get(name, value) not in (value, None):
                raise ValueError(f"{name}: expected {value!r}, got {raw[name]!r}")
        return config

    def to_dict(self) -> Json:
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "raw"}
        return {"architectures": ["OPTForCausalLM"], "model_type": "opt"} | self.raw | own


class OPTAttention(nn.Module):
    """Causal attention over all heads; every projection with a bias."""

    def __init__(self, config: OPTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (
            nn.Linear(config.hidden_size, config.hidden_size) for _ in range(4)
        )

    def forward(self, x: Tensor, *span: Any) -> Tensor:
        """`span` as of `causal_attention`."""
        q, k, v = (
            proj(x).unflatten(-1, (self.num_heads, -1))
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        y: Tensor = self.out_proj(causal_attention(q, k, v, *span))
        return y


class OPTLayer(nn.Module):
    """Pre-norm layer. Takes and returns (x, residual): the next norm adds them in its kernel."""

    def __init__(self, config: OPTConfig) -> None:
        super().__init__()
        self.self_attn = OPTAttention(config)
        self.self_attn_layer_norm = LayerNorm(config.hidden_size)
        self.fc1 = nn.Linear(config.hidden_size, config.ffn_dim)
        self.fc2 = nn.Linear(config.ffn_dim, config.hidden_size)
        self.final_layer_norm = LayerNorm(config.hidden_size)

    def forward(
        self, x: Tensor, residual: Tensor | None, position_ids: Tensor, *span: Any
    ) -> tuple[Tensor, Tensor]:
        y, residual = add_norm(self.self_attn_layer_norm, x, residual)
        y, residual = add_norm(self.final_layer_norm, self.self_attn(y, *span), residual)
        return self.fc2(nn.functional.relu(self.fc1(y))), residual


class OPTDecoder(PackedDecoder):
    """`PackedDecoder` with learned positions, under the published names."""

    def __init__(self, config: OPTConfig) -> None:
        super().__init__(config, lambda: OPTLayer(config))
        self.max_positions = config.max_position_embeddings
        self.embed_positions = nn.Embedding(self.max_positions + OFFSET, config.hidden_size)
        self.final_layer_norm = LayerNorm(config.hidden_size)

    @property
    def last_norm(self) -> LayerNorm:
        return self.final_layer_norm

    def add_positions(self, x: Tensor, position_ids: Tensor) -> Tensor:
        limit = self.embed_positions.num_embeddings - OFFSET
        if looks_at(position_ids) and position_ids.numel() and int(position_ids.max()) >= limit:
            raise ValueError(
                f"position_ids: expected less than {limit}, got {int(position_ids.max())}"
            )
        positions: Tensor = self.embed_positions(position_ids + OFFSET)
        return x + positions


class OPTModel(nn.Module):
    """Only a level of the published names."""

    def __init__(self, config: OPTConfig) -> None:
        super().__init__()
        self.decoder = OPTDecoder(config)


class OPTLanguage(nn.Module):
    """The decoder and its head, nested as the published names are: `model.decoder.*`, and
    `lm_head.weight` where the embeddings are not tied."""

    def __init__(self, config: OPTConfig) -> None:
        super().__init__()
        self.model = OPTModel(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """(vocab_size, hidden_size)"""
        tied = not hasattr(self, "lm_head")
        weight: Tensor = self.model.decoder.embed_tokens.weight if tied else self.lm_head.weight
        return weight


@dataclass
class OPTInputs:
    """What a prompt is made of: input_ids (batch, seqlen) or inputs_embeds; attention_mask, 0 on
    padding, on either side; position_ids, which start anew with every document of a row."""

    input_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None


class OPT(VLM):
    """OPT as a model of its own, without a vision tower: facebook/opt-2.7b and the like."""

    config_class = OPTConfig
    inputs_class = OPTInputs

    def __init__(self, config: OPTConfig) -> None:
        super().__init__(config)
        self.language_model = OPTLanguage(config)
        self.reset_parameters()

    @property
    def decoder(self) -> OPTDecoder:
        return self.language_model.model.decoder

    @property
    def head_weight(self) -> Tensor:
        return self.language_model.head_weight

    def own_name(self, stored: str) -> str:
        # The oldest files, those of facebook/opt-*, leave out "model.".
        prefix = "model." if stored.startswith("decoder.") else ""
        return f"language_model.{prefix}{stored}"

    def tied_names(self) -> Mapping[str, str]:
        head, embedding = "lm_head.weight", "model.decoder.embed_tokens.weight"
        tied = self.config.tie_word_embeddings
        return {f"language_model.{head}": f"language_model.{embedding}"} if tied else {}

    def published_state(self) -> Mapping[str, Tensor]:
        return self.language_model.state_dict()

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        logits_to_keep: int = 0,
        **prompt: Tensor | None,
    ) -> VLMOutput:
        """Logits of every token and, with labels, the loss; `prompt` as in `OPTInputs`, otherwise
        as of `Llava.forward`."""
        return self.run(OPTInputs(input_ids, **prompt), labels, num_items_in_batch, logits_to_keep)

    def embed(self, inputs: OPTInputs) -> Embedded:
        x = embed_text(inputs.input_ids, inputs.inputs_embeds, self.decoder)
        return embedded(x, inputs.attention_mask, inputs.position_ids)
