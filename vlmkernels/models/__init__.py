"""Complete reference models: `load` gives the right one for a checkpoint directory."""

from __future__ import annotations

from pathlib import Path

import torch

from vlmkernels.models.checkpoint import CONFIG, read_json
from vlmkernels.models.qwen2_vl import Qwen2VL, Qwen2VLProcessor

# config.json's model_type -> (model, processor). A new model joins here.
MODELS = {"qwen2_vl": (Qwen2VL, Qwen2VLProcessor)}


def load(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Qwen2VL:
    """The model of a published checkpoint directory, in eval mode.

    `dtype` None keeps what the files have; `device` None is the CPU. Raises ValueError when the
    directory holds no model that this package knows, or weights that do not fit its config.
    """
    return _entry(path)[0].from_pretrained(path, dtype=dtype, device=device)


def load_processor(path: str | Path) -> Qwen2VLProcessor:
    """The processor of a checkpoint directory: tokenizer, chat template, image settings."""
    return _entry(path)[1].from_pretrained(path)


def _entry(path: str | Path) -> tuple[type[Qwen2VL], type[Qwen2VLProcessor]]:
    if not Path(path).is_dir():
        raise ValueError(f"model: expected a checkpoint directory, found none at {path}")
    model_type = read_json(Path(path) / CONFIG).get("model_type")
    if model_type not in MODELS:
        raise ValueError(f"{path}: expected model_type in {sorted(MODELS)}, got {model_type!r}")
    return MODELS[model_type]
