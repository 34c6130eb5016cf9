"""Qwen2-VL's checkpoints. The model's own names are the published ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch

from vlmkernels.models.checkpoint import (
    CONFIG,
    GENERATION_CONFIG,
    Json,
    load_weights,
    read_json,
    save_checkpoint,
)

from .config import Qwen2VLConfig

Model = TypeVar("Model", bound="Qwen2VLWeights")

# What newer transformers calls a module in memory -> what every published file calls it.
_PREFIXES = (("model.visual.", "visual."), ("model.language_model.", "model."))

# Files of models with tied embeddings may hold the head as well.
_TIED = {"lm_head.weight": "model.embed_tokens.weight"}


def published_name(name: str) -> str:
    """`model.visual.*` -> `visual.*`, `model.language_model.*` -> `model.*`, else unchanged."""
    for prefix, published in _PREFIXES:
        if name.startswith(prefix):
            return published + name.removeprefix(prefix)
    return name


class Qwen2VLWeights:
    """Reading and writing checkpoint directories."""

    config: Qwen2VLConfig
    generation_config: Json

    @classmethod
    def from_pretrained(
        cls: type[Model],
        path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Model:
        """The model of a checkpoint directory, in eval mode; see `vlmkernels.models.load`."""
        path = Path(path)
        config = Qwen2VLConfig.from_dict(read_json(path / CONFIG))
        with torch.device("meta"):  # no memory and no time for weights that are then replaced
            model: Any = cls(config)  # type: ignore[call-arg]
        tied = _TIED if config.tie_word_embeddings else None
        load_weights(model, path, rename=published_name, tied=tied, dtype=dtype, device=device)
        if (path / GENERATION_CONFIG).is_file():
            model.generation_config = read_json(path / GENERATION_CONFIG)
        evaluating: Model = model.eval()
        return evaluating

    def save_pretrained(self: Any, path: str | Path, *, max_shard_bytes: int = 5 * 10**9) -> None:
        """Write config.json, generation_config.json and safetensors, in the published layout."""
        config = self.config.to_dict()
        config["dtype" if "dtype" in config else "torch_dtype"] = str(self.dtype).split(".")[-1]
        generation = self.generation_config or {"eos_token_id": self.config.eos_token_id}
        configs = {CONFIG: config, GENERATION_CONFIG: generation}
        save_checkpoint(path, self.state_dict(), configs, max_shard_bytes=max_shard_bytes)
