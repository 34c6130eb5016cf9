"""Qwen2-VL configuration: reads and writes the published config.json (arXiv 2409.12191).

Field names are those of the file, so a reader who knows the checkpoint knows this class.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from vlmkernels.models.checkpoint import Json
from vlmkernels.models.fields import (
    FLAG,
    INDEX,
    INDICES,
    NOT_NEGATIVE,
    OBJECT,
    THREE_INDICES,
    AttentionHeads,
    expect,
    expect_fields,
    preset_of,
)

# Published sizes (hub config.json files): name -> fields that differ from the defaults below.
PRESETS: dict[str, Json] = {
    "2B": {
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "intermediate_size": 8960,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "7B": {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
    },
    "72B": {
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 29568,
    },
}


class VisionFields:
    """Reading and writing `vision_config`; `out_field` names the width of what leaves the tower."""

    out_field: ClassVar[str]
    in_channels: int
    temporal_patch_size: int
    patch_size: int
    spatial_merge_size: int
    num_heads: int
    rope_theta: float

    @property
    def embed_dim(self) -> int:
        raise NotImplementedError

    @property
    def out_dim(self) -> int:
        """Width of the merged rows: hidden_size of the language model."""
        return int(getattr(self, self.out_field))

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch row: channels x frames x patch_size x patch_size."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    def check(self) -> None:
        _check_divides("vision embed_dim", self.embed_dim, "num_heads", self.num_heads)
        if self.head_dim % 4:
            raise ValueError(f"vision head_dim: expected a multiple of 4, got {self.head_dim}")

    @classmethod
    def from_dict(cls, raw: Json, out_dim: int) -> Self:
        """Known fields of a `vision_config`, under the two older names of some of them as well."""
        known = {k: raw[k] for k in _names(cls) if raw.get(k) is not None}
        for old, new in (("in_chans", "in_channels"), ("spatial_patch_size", "patch_size")):
            if raw.get(old) is not None:
                known.setdefault(new, raw[old])
        rope = _object(raw, "rope_parameters")
        known.update({k: v for k, v in rope.items() if k == "rope_theta"})
        return cls(**{cls.out_field: out_dim, **known})

    def to_dict(self, raw: Json) -> Json:
        out = raw | {name: getattr(self, name) for name in _names(type(self))}
        theta = out.pop("rope_theta")
        if "rope_parameters" in out:
            out["rope_parameters"] = (out["rope_parameters"] or {}) | {"rope_theta": theta}
        # The two older names, where the file has them or is new: some readers look at no other.
        for old, new in (("in_chans", self.in_channels), ("spatial_patch_size", self.patch_size)):
            if old in raw or not raw:
                out[old] = new
        return out


@dataclass
class Qwen2VLVisionConfig(VisionFields):
    """The vision tower: `depth` blocks of width `embed_dim`, merged to rows of `hidden_size`."""

    depth: int = 32
    embed_dim: int = 1280
    num_heads: int = 16
    mlp_ratio: float = 4
    hidden_size: int = 3584
    hidden_act: str = "quick_gelu"
    in_channels: int = 3
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    rope_theta: float = 10000.0

    out_field = "hidden_size"
    tokens_per_second: ClassVar[int | None] = None  # time is counted in steps of a video

    def __post_init__(self) -> None:
        expect_fields(self, "vision_config.")
        self.check()


@dataclass
class Qwen2VLConfig(AttentionHeads):
    """The whole model. `raw` is the config.json it came from: unknown keys survive a round trip.

    Raises ValueError for what the model does not compute: another `rope_scaling` than M-RoPE,
    sliding-window attention, sections that do not fill half a head; and for a field of another
    type or range than its own.
    """

    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    mrope_section: tuple[int, int, int] = (16, 24, 24)
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    bos_token_id: int | None = 151643
    eos_token_id: int | list[int] | None = 151645
    pad_token_id: int | None = None
    vision: Qwen2VLVisionConfig = field(default_factory=Qwen2VLVisionConfig)
    raw: Json = field(default_factory=dict, repr=False, compare=False)

    model_type: ClassVar[str] = "qwen2_vl"
    architecture: ClassVar[str] = "Qwen2VLForConditionalGeneration"
    presets: ClassVar[dict[str, Json]] = PRESETS
    vision_class: ClassVar[Any] = Qwen2VLVisionConfig

    def __post_init__(self) -> None:
        token_ids = {name: INDEX for name in _OUTER if name.endswith("_token_id")}
        expect_fields(
            self,
            mrope_section=THREE_INDICES,
            initializer_range=NOT_NEGATIVE,
            eos_token_id=INDICES,
            **token_ids,
        )
        self.mrope_section = tuple(self.mrope_section)  # type: ignore[assignment]  # JSON: list
        _check_divides("hidden_size", self.hidden_size, "num_attention_heads", self.num_heads)
        _check_divides("num_heads", self.num_heads, "num_key_value_heads", self.num_heads_k)
        if sum(self.mrope_section) * 2 != self.head_dim:
            raise ValueError(
                f"mrope_section: expected three numbers of sum {self.head_dim // 2}, "
                f"got {list(self.mrope_section)}"
            )
        if self.vision.out_dim != self.hidden_size:
            raise ValueError(
                f"vision_config.{self.vision.out_field}: expected hidden_size = "
                f"{self.hidden_size}, got {self.vision.out_dim}"
            )

    @classmethod
    def preset(cls, name: str) -> Self:
        """A published size: "2B", "7B", "72B", ...; `presets` has them all."""
        fields = dict(preset_of(cls.presets, name))
        vision = fields.pop("vision", {})
        return cls(**fields, vision=cls.vision_class.from_dict(vision, fields["hidden_size"]))

    @classmethod
    def from_dict(cls, raw: Json) -> Self:
        """From a config.json, flat (as published) or with a nested `text_config` (newer files).

        Published files are sparse, `vision_config` most of all; what is absent takes the
        published value, which is this class's default, never the default of another library.
        """
        text: Json = {**raw, **_object(raw, "text_config")}
        rope = _object(text, "rope_parameters") or _object(text, "rope_scaling")
        _check_supported(text, rope)
        known: Json = {
            k: text[k]
            for k in _names(cls)
            if k in text and (text[k] is not None or k.endswith("_token_id"))
        }
        known["tie_word_embeddings"] = (
            raw.get("tie_word_embeddings") or text.get("tie_word_embeddings") or False
        )
        known.update({k: rope[k] for k in ("rope_theta", "mrope_section") if k in rope})
        if "num_attention_heads" in known:
            known.setdefault("num_key_value_heads", known["num_attention_heads"])
        width = known.get("hidden_size", cls.hidden_size)
        vision = cls.vision_class.from_dict(_object(raw, "vision_config"), width)
        return cls(**known, vision=vision, raw=copy.deepcopy(raw))

    def to_dict(self) -> Json:
        """The config.json of this model: the layout it was read from, or the published flat one."""
        out = copy.deepcopy(self.raw)
        out.setdefault("architectures", [self.architecture])
        out.setdefault("model_type", self.model_type)
        text = out["text_config"] if out.get("text_config") else out
        nested_rope = "rope_parameters" in text
        for name in _names(type(self)):
            if name in _ROPE and nested_rope:
                continue
            if name != "mrope_section":
                (out if name in _OUTER else text)[name] = getattr(self, name)
        key = "rope_parameters" if nested_rope else "rope_scaling"
        rope = {"type": "mrope"} if text.get(key) is None else dict(text[key])
        text[key] = rope | {"mrope_section": list(self.mrope_section)}
        if nested_rope:
            text[key]["rope_theta"] = self.rope_theta
        out["vision_config"] = self.vision.to_dict(out.get("vision_config") or {})
        return out


_ROPE = ("rope_theta", "mrope_section")
_OUTER = (
    "tie_word_embeddings",
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
)


def _object(raw: Json, key: str) -> Json:
    """The JSON object under `key`, an empty one where there is none or null."""
    value = raw.get(key)
    return {} if value is None else dict(expect(key, value, OBJECT))


def _names(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls) if f.name not in ("vision", "raw")]


def _check_divides(name: str, value: int, by_name: str, by: int) -> None:
    if by <= 0 or value <= 0 or value % by:
        raise ValueError(f"{name}: expected a positive multiple of {by_name} = {by}, got {value}")


def _check_supported(text: Json, rope: Json) -> None:
    kind = rope.get("rope_type") or rope.get("type") or "mrope"
    if kind not in ("mrope", "default"):
        raise ValueError(f"rope_scaling type: expected 'mrope' or 'default', got {kind!r}")
    if expect("use_sliding_window", text.get("use_sliding_window") or False, FLAG):
        raise ValueError("use_sliding_window: expected false, got true")
