"""BLIP-2 configuration: reads and writes the published config.json (arXiv 2301.12597).

Field names are those of the file, so a reader who knows the checkpoint knows this class.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field
from typing import Any

from vlmkernels.models.fields import (
    FRACTION,
    INDEX,
    NOT_NEGATIVE,
    OBJECT,
    expect,
    expect_fields,
    expect_multiple,
    known_fields,
)

Json = dict[str, Any]

# What a checkpoint is for: the value of `architectures` in config.json. The last is LAVIS' name of
# the first-stage model, whose training heads transformers does not have.
GENERATION, RETRIEVAL, PRETRAINING = (
    "Blip2ForConditionalGeneration",
    "Blip2ForImageTextRetrieval",
    "Blip2Qformer",
)


@dataclass
class Blip2VisionConfig:
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
        if self.image_size < self.patch_size:
            raise ValueError(
                f"vision_config.image_size: expected at least patch_size = {self.patch_size}, "
                f"got {self.image_size}"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along height and width."""
        return (self.image_size // self.patch_size,) * 2


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


# BERT's words and LAVIS' [DEC], which starts a caption.
_TEXT_INPUT: Json = {"vocab_size": 30523, "use_qformer_text_input": True}


@dataclass
class Blip2Config:
    """The whole model. `raw` is the config.json it came from: unknown keys survive a round trip.

    architecture: GENERATION, RETRIEVAL or PRETRAINING. image_token_index: the placeholder of an
    image's queries in a prompt. caption_token_id: LAVIS' [DEC], what a text to be generated starts
    with in the first stage.
    """

    architecture: str = GENERATION
    num_query_tokens: int = 32
    image_text_hidden_size: int = 256
    image_token_index: int | None = None
    caption_token_id: int = 30522
    initializer_range: float = 0.02
    vision: Blip2VisionConfig = field(default_factory=Blip2VisionConfig)
    qformer: Blip2QFormerConfig = field(default_factory=Blip2QFormerConfig)
    raw: Json = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        expect_fields(self, caption_token_id=INDEX, initializer_range=NOT_NEGATIVE)
        kinds = (GENERATION, RETRIEVAL, PRETRAINING)
        if self.architecture not in kinds:
            raise ValueError(f"architectures: expected one of {kinds}, got {self.architecture!r}")
        if self.qformer.encoder_hidden_size != self.vision.hidden_size:
            raise ValueError(
                f"qformer_config.encoder_hidden_size: expected that of the vision tower, "
                f"{self.vision.hidden_size}, got {self.qformer.encoder_hidden_size}"
            )

    @classmethod
    def from_dict(cls, raw: Json) -> Blip2Config:
        """From a config.json; what a sparse file leaves out is that of the published models."""
        vision = Blip2VisionConfig(
            **known_fields(Blip2VisionConfig, _section(raw, "vision_config"))
        )
        # As transformers does: the tower says how wide an image is.
        width = {"encoder_hidden_size": vision.hidden_size}
        qformer = known_fields(Blip2QFormerConfig, _section(raw, "qformer_config"))
        own = {f.name for f in dataclasses.fields(cls)} - {
            "architecture",
            "vision",
            "qformer",
            "raw",
        }
        known = {k: v for k, v in raw.items() if k in own and v is not None}
        if raw.get("image_token_id") is not None:  # newer files
            known["image_token_index"] = raw["image_token_id"]
        kinds = raw.get("architectures") or [GENERATION]
        return cls(
            architecture=kinds[0],
            **known,
            vision=vision,
            qformer=Blip2QFormerConfig(**qformer | width),
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
        return out
