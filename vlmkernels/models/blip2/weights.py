"""BLIP-2's checkpoints. The model's own names are those of the published Hugging Face files."""

from __future__ import annotations

from collections.abc import Container

from vlmkernels.models.t5 import own_name as t5_own_name

from .config import GENERATION, PRETRAINING, RETRIEVAL


def own_name(stored: str) -> str:
    """The published name of a stored tensor; "" for what is no weight."""
    # Older files hold the running index of a table of positions.
    return "" if stored.endswith(".position_ids") else t5_own_name(stored)


def architecture_of(names: Container[str]) -> str:
    """What weights of these names are, where config.json does not say it."""
    if "itm_head.weight" not in names:
        return GENERATION
    return PRETRAINING if "temp" in names else RETRIEVAL
