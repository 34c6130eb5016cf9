"""What every model can do with a checkpoint directory: be read from it and be written to it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from vlmkernels.models.checkpoint import (
    CONFIG,
    GENERATION_CONFIG,
    Json,
    Piece,
    load_weights,
    read_json,
    save_checkpoint,
)


def read_generation_config(path: Path) -> Json:
    """generation_config.json of a checkpoint directory; empty where there is none."""
    file = path / GENERATION_CONFIG
    return read_json(file) if file.is_file() else {}


# What is done anyhow, under the names that transformers' Trainer has for it.
CHECKPOINTING: Mapping[str, tuple[Any, ...]] = {
    "gradient_checkpointing_kwargs": (None, {}, {"use_reentrant": False}),
    "every_n_layers": (1,),
    "offload": (False,),
}


class Pretrained(nn.Module):
    """A model with a `config`, whose own parameter names are the published ones."""

    config_class: ClassVar[Any]  # has from_dict and to_dict
    config: Any

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """The model of a checkpoint directory, in eval mode; see `vlmkernels.models.load`."""
        path = Path(path)
        model = cls.on_meta(cls.read_config(path))
        load_weights(
            model,
            path,
            rename=model.own_name,
            tied=model.tied_names(),
            dtype=dtype,
            device=device,
        )
        return model.eval()

    @classmethod
    def read_config(cls, path: Path) -> Any:
        return cls.config_class.from_dict(read_json(path / CONFIG))

    @classmethod
    def on_meta(cls, config: Any) -> Self:
        """Shapes and names only: no memory and no time for weights that are then replaced."""
        with torch.device("meta"):
            return cls(config)

    def save_pretrained(self, path: str | Path, *, max_shard_bytes: int = 5 * 10**9) -> None:
        """Write the configs and safetensors, in the published layout."""
        config = self.config.to_dict()
        config["dtype" if "dtype" in config else "torch_dtype"] = str(self.dtype).split(".")[-1]
        configs = {CONFIG: config, **self.other_configs(Path(path))}
        save_checkpoint(path, self.published_state(), configs, max_shard_bytes=max_shard_bytes)

    def own_name(self, stored: str) -> str | list[Piece]:
        """The parameter that a file holds under the name `stored`; "" for what is no weight."""
        return stored

    def tied_names(self) -> Mapping[str, str]:
        """Names that files may hold besides the model's -> the parameter with the same value."""
        return {}

    def published_state(self) -> Mapping[str, Tensor]:
        """What is written."""
        return self.state_dict()

    def other_configs(self, path: Path) -> dict[str, Json]:
        """JSON files written beside config.json into `path`, which may hold older ones."""
        return {}

    def gradient_checkpointing_enable(self, enable: bool = True, **options: Any) -> None:
        """Keep only each layer's inputs for the backward pass and compute the rest again there.

        options: those that transformers' Trainer passes; ValueError for what they cannot change.
        """
        for name, value in options.items():
            if value not in CHECKPOINTING.get(name, ()):
                raise ValueError(f"{name}: expected none, layers are always recomputed whole")
        module: Any
        for module in self.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = enable

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Matrices N(0, initializer_range), biases 0, norm weights 1."""
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1 or name.endswith("class_embedding"):
                parameter.normal_(std=self.config.initializer_range)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)


class PretrainedGenerator(Pretrained):
    """A model whose directory says how to generate as well."""

    # transformers' Trainer then weighs accumulated batches by their labels: num_items_in_batch.
    accepts_loss_kwargs: ClassVar[bool] = True
    generation_config: Json

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> Self:
        """The model of a checkpoint directory, in eval mode; see `vlmkernels.models.load`."""
        model = super().from_pretrained(path, **options)
        model.generation_config = read_generation_config(Path(path))
        return model

    def other_configs(self, path: Path) -> dict[str, Json]:
        generation = self.generation_config or {"eos_token_id": self.config.eos_token_id}
        return {GENERATION_CONFIG: generation}
