"""T5 configuration: reads and writes the published config.json, whose field names it has."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field

from vlmkernels.models.checkpoint import Json
from vlmkernels.models.fields import INDICES, expect_fields, preset_of

# feed_forward_proj -> its activations, the default first: BLIP-2's FlanT5 has the exact GELU.
FEED_FORWARD = {"gated-gelu": ("gelu_new", "gelu"), "relu": ("relu",)}
# Published sizes of FlanT5 (hub config.json files).
PRESETS: dict[str, Json] = {
    "flan-t5-xl": {"d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32},
    "flan-t5-xxl": {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64},
}


@dataclass
class T5Config:
    """config.json of a T5, or the `text_config` of a BLIP-2. Defaults are T5-small, which is what a
    sparse file leaves out. `raw` is the file it came from: unknown keys survive a round trip.

    tie_word_embeddings: False as in FlanT5: `lm_head.weight` is there, and nothing is scaled.
    """

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int | None = None  # None: num_layers
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"
    dense_act_fn: str | None = None  # None: the default of feed_forward_proj
    tie_word_embeddings: bool = True
    decoder_start_token_id: int | None = 0
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    raw: Json = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        expect_fields(self, eos_token_id=INDICES)
        if self.feed_forward_proj not in FEED_FORWARD:
            raise ValueError(
                f"feed_forward_proj: expected one of {[*FEED_FORWARD]}, "
                f"got {self.feed_forward_proj!r}"
            )
        acts = FEED_FORWARD[self.feed_forward_proj]
        self.dense_act_fn = self.dense_act_fn or acts[0]
        if self.dense_act_fn not in acts:
            raise ValueError(f"dense_act_fn: expected one of {acts}, got {self.dense_act_fn!r}")
        if self.relative_attention_num_buckets % 4:
            raise ValueError(
                "relative_attention_num_buckets: expected a multiple of 4, "
                f"got {self.relative_attention_num_buckets}"
            )
        if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 2:
            raise ValueError(
                "relative_attention_max_distance: expected more than half of the buckets, "
                f"got {self.relative_attention_max_distance}"
            )

    @classmethod
    def preset(cls, name: str) -> T5Config:
        """A published size: "flan-t5-xl" or "flan-t5-xxl"."""
        sizes = preset_of(PRESETS, name)
        return cls(feed_forward_proj="gated-gelu", tie_word_embeddings=False, **sizes)

    @classmethod
    def from_dict(cls, raw: Json) -> T5Config:
        if (kind := raw.get("model_type", "t5")) != "t5":
            raise ValueError(f"model_type: expected t5, got {kind!r}")
        names = {f.name for f in dataclasses.fields(cls)} - {"raw"}
        known = {name: raw[name] for name in names & raw.keys()}
        if "scale_decoder_outputs" in raw:  # newer transformers writes this, and tied in any case
            known["tie_word_embeddings"] = raw["scale_decoder_outputs"]
        return cls(**known, raw=copy.deepcopy(raw))

    def to_dict(self) -> Json:
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "raw"}
        own["scale_decoder_outputs"] = self.tie_word_embeddings
        defaults = {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}
        return defaults | {"model_type": "t5"} | self.raw | own
