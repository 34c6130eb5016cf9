"""BLIP-2 configuration: reads and writes the published config.json (arXiv 2301.12597).

Field names are those of the file, so a reader who knows the checkpoint knows this class.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vlmkernels.models.checkpoint import Json
from vlmkernels.models.fields import (
    FRACTION,
    INDEX,
    NOT_NEGATIVE,
    OBJECT,
    SquareImages,
    expect,
    expect_fields,
    expect_multiple,
    known_fields,
    preset_of,
)
from vlmkernels.models.opt import OPTConfig
from vlmkernels.models.t5 import T5Config

TextConfig = OPTConfig | T5Config

# What a checkpoint is for: the value of `architectures` in config.json. The last is LAVIS' name of
# the first-stage model, whose training heads transformers does not have.
GENERATION, RETRIEVAL, PRETRAINING = (
    "Blip2ForConditionalGeneration",
    "Blip2ForImageTextRetrieval",
    "Blip2Qformer",
)


@dataclass
class Blip2VisionConfig(SquareImages):
    """The image tower. Defaults are EVA-CLIP ViT-g/14, which sparse files leave out."""

    hidden_size: int = 1408
    intermediate_size: int = 6144
    num_hidden_layers: int = 39
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 14
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True

    def __post_init__(self) -> None:
        expect_fields(self, "vision_config.")
        expect_multiple(self, "vision_config.", "hidden_size", "num_attention_heads")
        self.expect_a_patch("vision_config.")


@dataclass
class Blip2QFormerConfig:
    """The Q-Former. Defaults are BERT-base's, which sparse files leave out.

    use_qformer_text_input: it has word embeddings and an MLP for text (the first stage).
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    cross_attention_frequency: int = 2
    encoder_hidden_size: int = 1408
    use_qformer_text_input: bool = False

    def __post_init__(self) -> None:
        expect_fields(self, "qformer_config.", hidden_dropout_prob=FRACTION)
        expect_multiple(self, "qformer_config.", "hidden_size", "num_attention_heads")


def _opt(name: str) -> TextConfig:
    """With the published rows for added tokens; a line's end ends an answer."""
    return dataclasses.replace(OPTConfig.preset(name), vocab_size=50304, eos_token_id=50118)


def _flan_t5(name: str) -> TextConfig:
    """With the exact GELU that LAVIS put in."""
    changes: Json = {"dense_act_fn": "gelu", "num_decoder_layers": 24, "raw": {"bos_token_id": 1}}
    return dataclasses.replace(T5Config.preset(name), **changes)


# Published sizes, Salesforce/blip2-*: name -> language model and placeholder; None: first stage.
PRESETS: dict[str, tuple[Callable[[], TextConfig], int] | None] = {
    "opt-2.7b": (lambda: _opt("2.7B"), 50265),
    "opt-6.7b": (lambda: _opt("6.7B"), 50265),
    "flan-t5-xl": (lambda: _flan_t5("flan-t5-xl"), 32100),
    "flan-t5-xxl": (lambda: _flan_t5("flan-t5-xxl"), 32100),
    "itm-vit-g": None,
}


@dataclass
class Blip2Config:
    """The whole model. `raw` is the config.json it came from: unknown keys survive a round trip.

    architecture: GENERATION, RETRIEVAL or PRETRAINING; only the first has a language model.
    image_token_index: the placeholder of an image's queries in a prompt. caption_token_id: LAVIS'
    [DEC], what a text to be generated starts with in the first stage.
    """

    architecture: str = GENERATION
    num_query_tokens: int = 32
    image_text_hidden_size: int = 256
    image_token_index: int | None = None
    caption_token_id: int = 30522
    initializer_range: float = 0.02
    vision: Blip2VisionConfig = field(default_factory=Blip2VisionConfig)
    qformer: Blip2QFormerConfig = field(default_factory=Blip2QFormerConfig)
    text: TextConfig | None = None
    raw: Json = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        expect_fields(self, caption_token_id=INDEX, initializer_range=NOT_NEGATIVE)
        kinds = (GENERATION, RETRIEVAL, PRETRAINING)
        if self.architecture not in kinds:
            raise ValueError(f"architectures: expected one of {kinds}, got {self.architecture!r}")
        if self.text is not None and self.image_token_index is None:
            raise ValueError("image_token_index: expected the placeholder's id, got null")
        if self.qformer.encoder_hidden_size != self.vision.hidden_size:
            raise ValueError(
                f"qformer_config.encoder_hidden_size: expected that of the vision tower, "
                f"{self.vision.hidden_size}, got {self.qformer.encoder_hidden_size}"
            )

    @property
    def bos_token_id(self) -> int:
        """What a caption starts with. A T5 has none by itself, but files of BLIP-2 say one."""
        text: Any = self.text
        token = getattr(text, "bos_token_id", text.raw.get("bos_token_id"))
        return int(expect("text_config.bos_token_id", token, INDEX))

    @property
    def eos_token_id(self) -> int | list[int] | None:
        return None if self.text is None else self.text.eos_token_id

    @property
    def pad_token_id(self) -> int | None:
        return None if self.text is None else self.text.pad_token_id

    @classmethod
    def preset(cls, name: str, *, image_size: int = 224) -> Blip2Config:
        """A published size: "opt-2.7b", "opt-6.7b", "flan-t5-xl", "flan-t5-xxl" or, of the first
        stage, "itm-vit-g". Models tuned on COCO's captions have image_size 364."""
        language = preset_of(PRESETS, name)
        vision = Blip2VisionConfig(image_size=image_size)
        if language is None:
            words = Blip2QFormerConfig(vocab_size=30523, use_qformer_text_input=True)
            return cls(RETRIEVAL, vision=vision, qformer=words)
        make_text, placeholder = language
        return cls(image_token_index=placeholder, vision=vision, text=make_text())

    @classmethod
    def from_dict(cls, raw: Json) -> Blip2Config:
        """From a config.json; what a sparse file leaves out is that of the published models."""
        keys = ("vision_config", "qformer_config", "text_config")
        parts = [expect(key, raw.get(key) or {}, OBJECT) for key in keys]
        vision = Blip2VisionConfig(**known_fields(Blip2VisionConfig, parts[0]))
        # As transformers does: the tower says how wide an image is.
        width = {"encoder_hidden_size": vision.hidden_size}
        qformer = known_fields(Blip2QFormerConfig, parts[1])
        known = known_fields(cls, raw)
        if raw.get("image_token_id") is not None:  # newer files
            known["image_token_index"] = raw["image_token_id"]
        kind = (raw.get("architectures") or [GENERATION])[0]
        return cls(
            architecture=kind,
            **known,
            vision=vision,
            qformer=Blip2QFormerConfig(**qformer | width),
            text=_read_text(parts[2]) if kind == GENERATION else None,
            raw=copy.deepcopy(raw),
        )

    def to_dict(self) -> Json:
        """The config.json of this model: what it was read from, or a new one."""
        out = copy.deepcopy(self.raw)
        out |= {"architectures": [self.architecture], "model_type": "blip-2"}
        names = ["num_query_tokens", "image_text_hidden_size", "image_token_index"]
        names += ["caption_token_id"] if self.architecture == PRETRAINING else []
        out |= {name: getattr(self, name) for name in names}
        for key, kind, part in (
            ("vision_config", "blip_2_vision_model", self.vision),
            ("qformer_config", "blip_2_qformer", self.qformer),
        ):
            out[key] = {"model_type": kind} | (out.get(key) or {}) | dataclasses.asdict(part)
        if self.text is not None:
            out["text_config"] = self.text.to_dict()
        return out


def _read_text(raw: Json) -> TextConfig:
    kinds: dict[str, Any] = {"opt": OPTConfig, "t5": T5Config}
    kind = raw.get("model_type", "opt")  # which files leave out
    if kind not in kinds:
        raise ValueError(f"text_config.model_type: expected one of {sorted(kinds)}, got {kind!r}")
    text: TextConfig = kinds[kind].from_dict(raw)
    return text
