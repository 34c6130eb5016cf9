"""CLIP configuration: reads and writes the published config.json (arXiv 2103.00020).

Field names are those of the file, so a reader who knows the checkpoint knows this class.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field

from vlmkernels.models.checkpoint import Json
from vlmkernels.models.fields import (
    INDEX,
    NOT_NEGATIVE,
    NUMBER,
    OBJECT,
    SquareImages,
    expect,
    expect_fields,
    expect_multiple,
    known_fields,
    preset_of,
)

# Published sizes: name -> (vision, text, projection_dim); what differs from the defaults below.
_BASE_TEXT: Json = {}
_LARGE_TEXT: Json = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
_L14: Json = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
}
_H14: Json = _L14 | {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
_H14 |= {"hidden_act": "gelu"}
_G14: Json = _H14 | {"hidden_size": 1664, "intermediate_size": 8192, "num_hidden_layers": 48}
_H14_TEXT: Json = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}
_G14_TEXT: Json = _H14_TEXT | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
}
PRESETS: dict[str, tuple[Json, Json, int]] = {
    "B/32": ({}, _BASE_TEXT, 512),
    "B/16": ({"patch_size": 16}, _BASE_TEXT, 512),
    "L/14": (_L14, _LARGE_TEXT, 768),
    "L/14-336": (_L14 | {"image_size": 336}, _LARGE_TEXT, 768),
    "H/14": (_H14, _H14_TEXT, 1024),  # LAION, by open_clip: exact GELU
    "bigG/14": (_G14, _G14_TEXT, 1280),
}


@dataclass
class ClipVisionConfig(SquareImages):
    """The image tower."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        expect_fields(self, "vision_config.")
        expect_multiple(self, "vision_config.", "hidden_size", "num_attention_heads")
        self.expect_a_patch("vision_config.")

    @classmethod
    def from_dict(cls, raw: Json) -> ClipVisionConfig:
        return cls(**known_fields(cls, raw))


@dataclass
class ClipTextConfig:
    """The text tower. eos_token_id 2 is that of older files: the largest id ends a text."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407

    def __post_init__(self) -> None:
        expect_fields(self, "text_config.", eos_token_id=INDEX)
        expect_multiple(self, "text_config.", "hidden_size", "num_attention_heads")


@dataclass
class ClipConfig:
    """Both towers. `raw` is the config.json it came from: unknown keys survive a round trip."""

    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592
    initializer_range: float = 0.02
    text: ClipTextConfig = field(default_factory=ClipTextConfig)
    vision: ClipVisionConfig = field(default_factory=ClipVisionConfig)
    raw: Json = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        expect_fields(self, logit_scale_init_value=NUMBER, initializer_range=NOT_NEGATIVE)

    @classmethod
    def preset(cls, name: str) -> ClipConfig:
        """A published size: "B/32", "B/16", "L/14", "L/14-336", "H/14" or "bigG/14"."""
        vision, text, dim = preset_of(PRESETS, name)
        return cls(dim, text=ClipTextConfig(**text), vision=ClipVisionConfig(**vision))

    @classmethod
    def from_dict(cls, raw: Json) -> ClipConfig:
        """From a config.json; what a sparse file leaves out is that of B/32, as published.

        Older files say a tower twice, as `text_config` and, with priority, `text_config_dict`.
        """
        towers = [
            {
                **expect(key, raw.get(key) or {}, OBJECT),
                **expect(f"{key}_dict", raw.get(f"{key}_dict") or {}, OBJECT),
            }
            for key in ("text_config", "vision_config")
        ]
        known = {
            name: raw[name]
            for name in ("projection_dim", "logit_scale_init_value")
            if raw.get(name) is not None
        }
        text = ClipTextConfig(**known_fields(ClipTextConfig, towers[0]))
        vision = ClipVisionConfig.from_dict(towers[1])
        return cls(**known, text=text, vision=vision, raw=copy.deepcopy(raw))

    def to_dict(self) -> Json:
        """The config.json of this model: what it was read from, or a new one."""
        out = copy.deepcopy(self.raw)
        out.setdefault("architectures", ["CLIPModel"])
        out |= {"model_type": "clip", "projection_dim": self.projection_dim}
        out["logit_scale_init_value"] = self.logit_scale_init_value
        for key, tower in (("text_config", self.text), ("vision_config", self.vision)):
            out.pop(f"{key}_dict", None)
            new = {"projection_dim": self.projection_dim} | (out.get(key) or {})
            out[key] = new | dataclasses.asdict(tower)
        return out
