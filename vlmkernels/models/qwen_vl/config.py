"""Qwen-VL configuration: reads and writes the published config.json (arXiv 2308.12966).

Field names are those of the file, so a reader who knows the checkpoint knows this class.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field
from math import isqrt

from vlmkernels.models.checkpoint import Json
from vlmkernels.models.fields import (
    INDEX,
    NOT_NEGATIVE,
    OBJECT,
    AttentionHeads,
    expect,
    expect_fields,
    preset_of,
)

# Published sizes (hub config.json files). Qwen-VL and Qwen-VL-Chat are one.
PRESETS: dict[str, Json] = {"9.6B": {}}
# What this package computes; a config file that asks for something else is refused.
_COMPUTED: Json = {
    "no_bias": True,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "tie_word_embeddings": False,
    "attn_dropout_prob": 0.0,
    "emb_dropout_prob": 0.0,
}


@dataclass
class QwenVisionConfig:
    """The image tower, `visual` of the file: ViT-bigG of OpenCLIP and the resampler.

    n_queries tokens stand for every image, between the tokens image_start_id (<img>) and
    image_start_id + 1 (</img>); image_start_id + 2 (<imgpad>) fills their places.
    """

    image_size: int = 448
    patch_size: int = 14
    width: int = 1664
    layers: int = 48
    heads: int = 16
    mlp_ratio: float = 4.9231
    output_dim: int = 4096
    n_queries: int = 256
    image_start_id: int = 151857

    def __post_init__(self) -> None:
        expect_fields(self, "visual.", image_start_id=INDEX)
        for name, value, by in (
            ("width", self.width, self.heads),
            ("output_dim", self.output_dim, 128),  # the resampler's head_dim
            ("image_size", self.image_size, self.patch_size),
        ):
            if value % by:
                raise ValueError(f"visual.{name}: expected a multiple of {by}, got {value}")
        if isqrt(self.n_queries) ** 2 != self.n_queries:
            raise ValueError(f"visual.n_queries: expected a square, got {self.n_queries}")

    @property
    def mlp_dim(self) -> int:
        return int(self.width * self.mlp_ratio)


@dataclass
class QwenVLConfig(AttentionHeads):
    """The whole model. `raw` is the config.json it came from: unknown keys survive a round trip.

    intermediate_size: of both halves of the gated MLP together. seq_length: what the model was
    trained on; beyond it use_dynamic_ntk and use_logn_attn act, outside of training.
    """

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    kv_channels: int = 128
    layer_norm_epsilon: float = 1e-6
    rotary_emb_base: float = 10000
    seq_length: int = 2048
    max_position_embeddings: int = 8192
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    initializer_range: float = 0.02
    visual: QwenVisionConfig = field(default_factory=QwenVisionConfig)
    raw: Json = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        expect_fields(self, initializer_range=NOT_NEGATIVE)
        for name, value, expected in (
            ("kv_channels", self.kv_channels * self.num_attention_heads, self.hidden_size),
            ("visual.output_dim", self.visual.output_dim, self.hidden_size),
        ):
            if value != expected:
                raise ValueError(f"{name}: expected to give hidden_size {expected}, got {value}")
        if self.intermediate_size % 2:
            raise ValueError(
                f"intermediate_size: expected a multiple of 2, got {self.intermediate_size}"
            )
        if self.visual.image_start_id + 2 >= self.vocab_size:
            raise ValueError(
                f"visual.image_start_id: expected less than vocab_size - 2 = "
                f"{self.vocab_size - 2}, got {self.visual.image_start_id}"
            )

    @property
    def eos_token_id(self) -> int | None:
        eos: int | None = self.raw.get("eos_token_id")
        return eos

    @property
    def pad_token_id(self) -> int | None:
        pad: int | None = self.raw.get("pad_token_id")
        return pad

    @classmethod
    def preset(cls, name: str) -> QwenVLConfig:
        """A published size: "9.6B"."""
        return cls(**preset_of(PRESETS, name))

    @classmethod
    def from_dict(cls, raw: Json) -> QwenVLConfig:
        """From a config.json; ValueError naming the key that asks for what is not computed here."""
        if raw.get("visual") is None:
            raise ValueError("visual: expected an object (Qwen-VL's config.json has one), got none")
        for name, value in _COMPUTED.items():
            if raw.get(name, value) != value:
                raise ValueError(f"{name}: expected {value!r}, got {raw[name]!r}")
        known = {k: raw[k] for k in _names(cls) & raw.keys() if raw[k] is not None}
        visual = expect("visual", known.pop("visual"), OBJECT)
        known_visual = {k: visual[k] for k in _names(QwenVisionConfig) & visual.keys()}
        return cls(**known, visual=QwenVisionConfig(**known_visual), raw=copy.deepcopy(raw))

    def to_dict(self) -> Json:
        """The config.json of this model: what it was read from, or a new one."""
        new: Json = {"architectures": ["QWenLMHeadModel"], "model_type": "qwen"}
        out: Json = new | _COMPUTED | copy.deepcopy(self.raw)
        visual = (out.get("visual") or {}) | dataclasses.asdict(self.visual)
        return out | {name: getattr(self, name) for name in _names(type(self))} | {"visual": visual}


def _names(cls: type) -> set[str]:
    return {f.name for f in dataclasses.fields(cls)} - {"raw"}
