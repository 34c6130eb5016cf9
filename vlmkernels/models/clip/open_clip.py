"""open_clip's checkpoint layout: open_clip_config.json and open_clip_model.safetensors.

There q, k, v are stored in one matrix, and the projections transposed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlmkernels.models.checkpoint import (
    CONFIG,
    Json,
    Piece,
    load_weights,
    read_json,
    save_checkpoint,
)
from vlmkernels.models.fields import OBJECT, expect

from .config import ClipConfig, ClipTextConfig, ClipVisionConfig

if TYPE_CHECKING:
    from .model import Clip

OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"

# open_clip's name -> ours, where the tensor is the same.
_WHOLE = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "logit_scale": "logit_scale",
}
_NORMS = {
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "ln_final": "text_model.final_layer_norm",
}
_TRANSPOSED = {"visual.proj": "visual_projection", "text_projection": "text_projection"}
_BLOCKS = {
    "visual.transformer.resblocks": "vision_model.encoder.layers",
    "transformer.resblocks": "text_model.encoder.layers",
}
_IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_QKV = ("q_proj", "k_proj", "v_proj")


def is_directory(path: str | Path) -> bool:
    """Whether the directory has open_clip's config and not that of Hugging Face."""
    return (Path(path) / OPEN_CLIP_CONFIG).is_file() and not (Path(path) / CONFIG).is_file()


def own_name(stored: str) -> str | list[Piece]:
    """What of ours an open_clip name holds; unknown names stay and are then reported."""
    if stored in _WHOLE:
        return _WHOLE[stored]
    if stored in _TRANSPOSED:
        return [Piece(f"{_TRANSPOSED[stored]}.weight", transposed=True)]
    if stored == "attn_mask":  # the causal mask: no weight
        return ""
    stem, _, leaf = stored.rpartition(".")
    if stem in _NORMS:
        return f"{_NORMS[stem]}.{leaf}"
    match = re.fullmatch(r"(.*resblocks)\.(\d+)\.(.+)", stored)
    if match is None or match[1] not in _BLOCKS:
        return stored
    layer = f"{_BLOCKS[match[1]]}.{match[2]}"
    if match[3].startswith("attn.in_proj_"):
        leaf = match[3].removeprefix("attn.in_proj_")
        names = [f"{layer}.self_attn.{proj}.{leaf}" for proj in _QKV]
        return [Piece(name, part, 3) for part, name in enumerate(names)]
    stem, _, leaf = match[3].rpartition(".")
    return f"{layer}.{_IN_BLOCK[stem]}.{leaf}" if stem in _IN_BLOCK else stored


def open_clip_state(state: dict[str, Tensor], config: ClipConfig) -> dict[str, Tensor]:
    """The tensors of a model under open_clip's names."""
    out = {theirs: state[ours] for theirs, ours in _WHOLE.items()}
    out |= {theirs: state[f"{ours}.weight"].T for theirs, ours in _TRANSPOSED.items()}
    pairs = dict(_NORMS)
    depths = (config.vision.num_hidden_layers, config.text.num_hidden_layers)
    for (theirs, ours), depth in zip(_BLOCKS.items(), depths, strict=True):
        for i in range(depth):
            pairs |= {f"{theirs}.{i}.{a}": f"{ours}.{i}.{b}" for a, b in _IN_BLOCK.items()}
            for leaf in ("weight", "bias"):
                parts = [state[f"{ours}.{i}.self_attn.{proj}.{leaf}"] for proj in _QKV]
                out[f"{theirs}.{i}.attn.in_proj_{leaf}"] = torch.cat(parts)
    for theirs, ours in pairs.items():
        out |= {f"{theirs}.{leaf}": state[f"{ours}.{leaf}"] for leaf in ("weight", "bias")}
    return out


def config_from(raw: Json) -> ClipConfig:
    """From an open_clip_config.json; widths and heads as open_clip derives them."""
    model = expect("model_cfg", raw.get("model_cfg") or {}, OBJECT)
    vision = expect("vision_cfg", model.get("vision_cfg") or {}, OBJECT)
    text = expect("text_cfg", model.get("text_cfg") or {}, OBJECT)
    act = "quick_gelu" if model.get("quick_gelu") else "gelu"
    width, text_width = vision.get("width", 768), text.get("width", 512)
    return ClipConfig(
        projection_dim=model.get("embed_dim", 512),
        vision=ClipVisionConfig(
            hidden_size=width,
            intermediate_size=int(width * vision.get("mlp_ratio", 4.0)),
            num_hidden_layers=vision.get("layers", 12),
            num_attention_heads=width // vision.get("head_width", 64),
            image_size=vision.get("image_size", 224),
            patch_size=vision.get("patch_size", 16),
            hidden_act=act,
        ),
        text=ClipTextConfig(
            vocab_size=text.get("vocab_size", 49408),
            hidden_size=text_width,
            intermediate_size=int(text_width * text.get("mlp_ratio", 4.0)),
            num_hidden_layers=text.get("layers", 12),
            num_attention_heads=text.get("heads", 8),
            max_position_embeddings=text.get("context_length", 77),
            hidden_act=act,
            eos_token_id=2,  # open_clip takes the place of the largest id
        ),
    )


def config_to(config: ClipConfig) -> Json:
    """The model part of an open_clip_config.json."""
    vision, text = config.vision, config.text
    if vision.hidden_act != text.hidden_act:
        raise ValueError("hidden_act: open_clip has one for both towers")
    return {
        "model_cfg": {
            "embed_dim": config.projection_dim,
            "quick_gelu": vision.hidden_act == "quick_gelu",
            "vision_cfg": {
                "image_size": vision.image_size,
                "layers": vision.num_hidden_layers,
                "width": vision.hidden_size,
                "head_width": vision.hidden_size // vision.num_attention_heads,
                # The half unit keeps int(width * ratio) from falling one short.
                "mlp_ratio": (vision.intermediate_size + 0.5) / vision.hidden_size,
                "patch_size": vision.patch_size,
            },
            "text_cfg": {
                "context_length": text.max_position_embeddings,
                "vocab_size": text.vocab_size,
                "width": text.hidden_size,
                "mlp_ratio": (text.intermediate_size + 0.5) / text.hidden_size,
                "heads": text.num_attention_heads,
                "layers": text.num_hidden_layers,
            },
        }
    }


def read_config(path: str | Path) -> ClipConfig:
    return config_from(read_json(Path(path) / OPEN_CLIP_CONFIG))


def load(model: Clip, path: str | Path, **options: Any) -> None:
    """Fill the model from an open_clip directory."""
    load_weights(model, path, rename=own_name, weights=OPEN_CLIP_WEIGHTS, **options)


def save(model: Clip, path: Path) -> None:
    """Write the model as open_clip does; ValueError where the other layout lies already."""
    if (path / CONFIG).exists():
        raise ValueError(f"{path}: expected a directory without {CONFIG}, which goes first")
    state = open_clip_state(dict(model.state_dict()), model.config)
    save_checkpoint(
        path, state, {OPEN_CLIP_CONFIG: config_to(model.config)}, weights=OPEN_CLIP_WEIGHTS
    )
