"""ViT configuration: reads and writes the published config.json (arXiv 2010.11929).

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
    OBJECT,
    SquareImages,
    expect,
    expect_fields,
    expect_multiple,
    preset_of,
)

_BASE: Json = {}
_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
_HUGE = {
    "hidden_size": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "intermediate_size": 5120,
}
# Published sizes (table 1 of the paper): name -> fields that differ from the defaults below.
PRESETS: dict[str, Json] = {
    "B/16": _BASE | {"patch_size": 16},
    "B/32": _BASE | {"patch_size": 32},
    "L/16": _LARGE | {"patch_size": 16},
    "L/32": _LARGE | {"patch_size": 32},
    "H/14": _HUGE | {"patch_size": 14},
}


@dataclass
class ViTConfig(SquareImages):
    """The whole model. `raw` is the config.json it came from: unknown keys survive a round trip.

    num_labels 0: no classification head. pooler: the tanh layer on [CLS] of `ViTModel` files.
    Raises ValueError for a field of another type or range than its own.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    qkv_bias: bool = True
    initializer_range: float = 0.02
    num_labels: int = 1000
    pooler: bool = False
    raw: Json = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        expect_fields(self, initializer_range=NOT_NEGATIVE, num_labels=INDEX)
        expect_multiple(self, "", "hidden_size", "num_attention_heads")
        self.expect_a_patch()

    @classmethod
    def preset(cls, name: str, *, image_size: int = 224, num_labels: int = 1000) -> ViTConfig:
        """A published size: "B/16", "B/32", "L/16", "L/32" or "H/14", for any resolution."""
        return cls(**preset_of(PRESETS, name), image_size=image_size, num_labels=num_labels)

    @classmethod
    def from_dict(cls, raw: Json) -> ViTConfig:
        """From a config.json. The number of labels is that of `id2label`; a classifier without one
        has two (transformers leaves out what is its default)."""
        names = {f.name for f in dataclasses.fields(cls)} - {"raw", "pooler", "num_labels"}
        known = {k: v for k, v in raw.items() if k in names and v is not None}
        labels = expect("id2label", raw.get("id2label") or {}, OBJECT)
        kinds = raw.get("architectures") or (["ViTForImageClassification"] if labels else [])
        classifies = "ViTForImageClassification" in kinds
        known["num_labels"] = raw.get("num_labels", len(labels) or 2) if classifies else 0
        known["pooler"] = "ViTModel" in kinds
        return cls(**known, raw=copy.deepcopy(raw))

    def to_dict(self) -> Json:
        """The config.json of this model: what it was read from, or a new one."""
        out = copy.deepcopy(self.raw) | dataclasses.asdict(self)
        for ours in ("raw", "pooler", "num_labels"):
            del out[ours]
        out["model_type"] = "vit"
        out.setdefault(
            "architectures", ["ViTModel" if self.pooler else "ViTForImageClassification"]
        )
        if self.num_labels and len(out.get("id2label") or {}) != self.num_labels:
            out["id2label"] = {str(i): f"LABEL_{i}" for i in range(self.num_labels)}
            out["label2id"] = {f"LABEL_{i}": i for i in range(self.num_labels)}
        return out

    def label(self, index: int) -> str:
        """The name of a class, as config.json has it."""
        return str((self.raw.get("id2label") or {}).get(str(index), f"LABEL_{index}"))
