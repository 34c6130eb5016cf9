"""BLIP-2's checkpoints. The model's own names are those of the published Hugging Face files."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path

from vlmkernels.models.checkpoint import CONFIG, read_headers, read_json
from vlmkernels.models.t5 import own_name as t5_own_name

from .config import GENERATION, PRETRAINING, RETRIEVAL, Blip2Config


def own_name(stored: str) -> str:
    """The published name of a stored tensor; "" for what is no weight."""
    # Older files hold the running index of a table of positions.
    return "" if stored.endswith(".position_ids") else t5_own_name(stored)


# BERT's names -> those of the first stage.
_BERT = (
    ("bert.embeddings.LayerNorm.", "qformer.layernorm."),
    ("bert.embeddings.", "embeddings."),
    ("bert.encoder.", "qformer.encoder."),
    (".attention.self.", ".attention.attention."),
    (".LayerNorm.gamma", ".LayerNorm.weight"),  # files of bert-base-uncased
    (".LayerNorm.beta", ".LayerNorm.bias"),
    ("qformer.layernorm.gamma", "qformer.layernorm.weight"),
    ("qformer.layernorm.beta", "qformer.layernorm.bias"),
)


def names_of_bert(stored: str) -> list[str]:
    """Where the first stage has a tensor of BERT's: words and queries begin with one MLP."""
    for theirs, own in _BERT:
        stored = stored.replace(theirs, own)
    names = [stored]
    for part in (".intermediate.", ".output."):
        if part in stored and ".attention." not in stored:
            names.append(stored.replace(part, f"{part[:-1]}_query."))
    return names


def architecture_of(names: Container[str]) -> str:
    """What weights of these names are, where config.json does not say it."""
    if "itm_head.weight" not in names:
        return GENERATION
    return PRETRAINING if "temp" in names else RETRIEVAL


def read_config(path: Path) -> Blip2Config:
    """A directory's; the names of its weights say the stage where config.json does not."""
    raw = read_json(path / CONFIG)
    if not raw.get("architectures"):
        raw["architectures"] = [architecture_of(read_headers(path, own_name))]
    return Blip2Config.from_dict(raw)
