"""LLaVA-1.5 configuration: reads and writes the published config.json (arXiv 2310.03744).

Field names are those of the file, so a reader who knows the checkpoint knows this class.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field

from vlmkernels.models.checkpoint import Json
from vlmkernels.models.clip import ClipVisionConfig
from vlmkernels.models.fields import (
    INDEX,
    INDICES,
    INTEGER,
    INTEGER_OR_NONE,
    NOT_NEGATIVE,
    OBJECT,
    AttentionHeads,
    expect,
    expect_fields,
    preset_of,
)

STRATEGIES = ("default", "full")
_CLIP_L_336: Json = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
# Published sizes (hub config.json files): name -> text fields that differ from LLaMA-2-7B's.
PRESETS: dict[str, Json] = {
    "7B": {},
    "13B": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
}


@dataclass
class LlavaTextConfig(AttentionHeads):
    """The language model. Defaults are what a sparse `text_config` leaves out: LLaMA-7B."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        expect_fields(self, "text_config.", eos_token_id=INDICES, pad_token_id=INTEGER_OR_NONE)
        for name, value, by in (
            ("hidden_size", self.hidden_size, self.num_attention_heads),
            ("num_attention_heads", self.num_attention_heads, self.num_heads_k),
        ):
            if value % by:
                raise ValueError(f"text_config.{name}: expected a multiple of {by}, got {value}")

    @classmethod
    def from_dict(cls, raw: Json) -> LlavaTextConfig:
        _check_text(raw)
        rope = expect("rope_parameters", raw.get("rope_parameters") or {}, OBJECT)
        known = {k: v for k, v in raw.items() if k in _names(cls) and v is not None}
        known.update({k: v for k, v in rope.items() if k == "rope_theta"})
        return cls(**known)

    def to_dict(self, raw: Json) -> Json:
        out = {"model_type": "llama"} | raw | dataclasses.asdict(self)
        if raw.get("rope_parameters"):
            out["rope_parameters"] = raw["rope_parameters"] | {"rope_theta": out.pop("rope_theta")}
        return out


@dataclass
class LlavaConfig:
    """The whole model. `raw` is the config.json it came from: unknown keys survive a round trip.

    vision_feature_layer: whose output the projector gets, as an index into all hidden states, the
    embeddings being number 0; "default" leaves out [CLS], "full" keeps it.
    """

    image_token_index: int = 32000
    projector_hidden_act: str = "gelu"
    vision_feature_layer: int = -2
    vision_feature_select_strategy: str = "default"
    multimodal_projector_bias: bool = True
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    text: LlavaTextConfig = field(default_factory=LlavaTextConfig)
    vision: ClipVisionConfig = field(default_factory=lambda: ClipVisionConfig(**_CLIP_L_336))
    raw: Json = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        expect_fields(
            self,
            image_token_index=INDEX,
            vision_feature_layer=INTEGER,
            initializer_range=NOT_NEGATIVE,
        )
        if self.vision_feature_select_strategy not in STRATEGIES:
            raise ValueError(
                f"vision_feature_select_strategy: expected one of {STRATEGIES}, "
                f"got {self.vision_feature_select_strategy!r}"
            )
        if not 0 <= self.feature_depth <= self.vision.num_hidden_layers:
            raise ValueError(
                f"vision_feature_layer: expected one of {self.vision.num_hidden_layers + 1} hidden "
                f"states, got {self.vision_feature_layer}"
            )

    @property
    def feature_depth(self) -> int:
        """How many layers of the vision tower run."""
        layer = self.vision_feature_layer
        return layer if layer >= 0 else self.vision.num_hidden_layers + 1 + layer

    @property
    def eos_token_id(self) -> int | list[int] | None:
        return self.text.eos_token_id

    @property
    def pad_token_id(self) -> int | None:
        pad: int | None = self.raw.get("pad_token_id")
        return self.text.pad_token_id if pad is None else pad

    @classmethod
    def preset(cls, name: str) -> LlavaConfig:
        """A published size: "7B" or "13B"."""
        sizes = preset_of(PRESETS, name)
        text: Json = {"vocab_size": 32064, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096}
        return cls(text=LlavaTextConfig(**text, **sizes, pad_token_id=32001))

    @classmethod
    def from_dict(cls, raw: Json) -> LlavaConfig:
        """From a config.json; what a sparse file leaves out is CLIP-L/336 and LLaMA-7B."""
        names = _names(cls) - {"text", "vision", "raw", "initializer_range"}
        known = {k: v for k, v in raw.items() if k in names and v is not None}
        if raw.get("image_token_id") is not None:  # newer files
            known["image_token_index"] = raw["image_token_id"]
        text = expect("text_config", raw.get("text_config") or {}, OBJECT)
        vision = expect("vision_config", raw.get("vision_config") or {}, OBJECT)
        if (kind := vision.get("model_type", "clip_vision_model")) != "clip_vision_model":
            raise ValueError(f"vision_config.model_type: expected clip_vision_model, got {kind!r}")
        return cls(
            **known,
            text=LlavaTextConfig.from_dict(text),
            vision=ClipVisionConfig.from_dict(_CLIP_L_336 | vision),
            raw=copy.deepcopy(raw),
        )

    def to_dict(self) -> Json:
        """The config.json of this model: what it was read from, or a new one."""
        out = copy.deepcopy(self.raw)
        out.setdefault("architectures", ["LlavaForConditionalGeneration"])
        out["model_type"] = "llava"
        for name in _names(type(self)) - {"text", "vision", "raw", "initializer_range"}:
            out[name] = getattr(self, name)
        out["image_token_id"] = out["image_token_index"]
        out["text_config"] = self.text.to_dict(out.get("text_config") or {})
        vision = {"model_type": "clip_vision_model"} | (out.get("vision_config") or {})
        out["vision_config"] = vision | dataclasses.asdict(self.vision)
        return out


def _names(cls: type) -> set[str]:
    return {f.name for f in dataclasses.fields(cls)}


def _check_text(raw: Json) -> None:
    kind = raw.get("model_type", "llama")
    if kind != "llama":
        raise ValueError(f"text_config.model_type: expected llama, got {kind!r}")
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if (scaling := rope.get("rope_type") or rope.get("type") or "default") != "default":
        raise ValueError(f"text_config.rope_scaling: expected none, got {scaling!r}")
    if raw.get("attention_bias") or raw.get("mlp_bias"):
        raise ValueError("text_config: expected no attention_bias and no mlp_bias, got one")
