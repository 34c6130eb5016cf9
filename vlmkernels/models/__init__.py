"""Complete reference models: `load` gives the right one for a checkpoint directory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlmkernels.models import blip2, clip, llava, qwen2_5_vl, qwen2_vl, qwen_vl, vit
from vlmkernels.models.checkpoint import CONFIG, read_json

__all__ = ["MODELS", "Entry", "load", "load_processor", "model_class"]


@dataclass(frozen=True)
class Entry:
    """A model of this package. `does`: what goes in and what comes out; `status`: for whom."""

    title: str
    model: type[Any]
    processor: type[Any]
    sizes: tuple[str, ...]
    does: str
    paper: str
    status: str = "complete"


# config.json's model_type -> model. A new model joins here.
MODELS: dict[str, Entry] = {
    "vit": Entry(
        "ViT",
        *(vit.ViT, vit.ViTProcessor, tuple(vit.config.PRESETS)),
        does="image -> class",
        paper="arXiv 2010.11929",
    ),
    "clip": Entry(
        "CLIP",
        *(clip.Clip, clip.ClipProcessor, tuple(clip.config.PRESETS)),
        does="image, text -> similarity",
        paper="arXiv 2103.00020",
    ),
    "blip-2": Entry(
        "BLIP-2",
        *(blip2.Blip2, blip2.Blip2Processor, tuple(blip2.config.PRESETS)),
        does="images, text -> text; image, text -> similarity, match",
        paper="arXiv 2301.12597",
    ),
    "llava": Entry(
        "LLaVA-1.5",
        *(llava.Llava, llava.LlavaProcessor, tuple(llava.config.PRESETS)),
        does="images, text -> text",
        paper="arXiv 2310.03744",
    ),
    "qwen": Entry(
        "Qwen-VL",
        *(qwen_vl.QwenVL, qwen_vl.QwenVLProcessor, tuple(qwen_vl.config.PRESETS)),
        does="images, text -> text, boxes",
        paper="arXiv 2308.12966",
    ),
    "qwen2_vl": Entry(
        "Qwen2-VL",
        *(qwen2_vl.Qwen2VL, qwen2_vl.Qwen2VLProcessor, tuple(qwen2_vl.config.PRESETS)),
        does="images, videos, text -> text",
        paper="arXiv 2409.12191",
    ),
    "qwen2_5_vl": Entry(
        "Qwen2.5-VL",
        *(qwen2_5_vl.Qwen25VL, qwen2_5_vl.Qwen25VLProcessor, tuple(qwen2_5_vl.config.PRESETS)),
        does="images, videos, text -> text",
        paper="arXiv 2502.13923",
    ),
}


def load(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Any:
    """The model of a published checkpoint directory, in eval mode; its class is in MODELS.

    `dtype` None keeps what the files have; `device` None is the CPU. Raises ValueError when the
    directory holds no model that this package knows, or weights that do not fit its config.
    """
    return _entry(path).model.from_pretrained(path, dtype=dtype, device=device)


def model_class(path: str | Path) -> Any:
    """The class of what `load` gives."""
    kind = _entry(path).model
    return kind.class_of(path) if issubclass(kind, blip2.Blip2) else kind


def load_processor(path: str | Path) -> Any:
    """The processor of a checkpoint directory: tokenizer, chat template, image settings."""
    return _entry(path).processor.from_pretrained(path)


def _entry(path: str | Path) -> Entry:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path: expected that of a checkpoint directory, got {path!r:.80}")
    if not Path(path).is_dir():
        raise ValueError(f"model: expected a checkpoint directory, found none at {path}")
    if clip.open_clip.is_directory(path):
        return MODELS["clip"]
    model_type = read_json(Path(path) / CONFIG).get("model_type")
    if not isinstance(model_type, str) or model_type not in MODELS:
        raise ValueError(f"{path}: expected model_type in {sorted(MODELS)}, got {model_type!r}")
    return MODELS[model_type]
