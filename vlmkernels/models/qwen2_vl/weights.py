"""Qwen2-VL's checkpoints. The model's own names are the published ones."""

from __future__ import annotations

# What newer transformers calls a module in memory -> what every published file calls it.
_PREFIXES = (("model.visual.", "visual."), ("model.language_model.", "model."))


def published_name(name: str) -> str:
    """`model.visual.*` -> `visual.*`, `model.language_model.*` -> `model.*`, else unchanged."""
    for prefix, published in _PREFIXES:
        if name.startswith(prefix):
            return published + name.removeprefix(prefix)
    return name
