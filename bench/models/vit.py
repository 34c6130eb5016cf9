"""ViT classification and training step against transformers with the very same weights."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.case import Case
from bench.whole import Inputs, model_cases, same_weights, train_step
from vlmkernels.models.vit import ViT, ViTConfig


def cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    if device.startswith("cuda"):
        config = ViTConfig.preset("L/16")
        yield from cases_of(config, 64, "vit_l_16_224", device, dtype)
    else:
        config = replace(ViTConfig.preset("B/16"), num_hidden_layers=3)
        yield from cases_of(config, 4, "vit_b_16_224 (3 layers)", device, dtype)


def cases_of(
    config: ViTConfig, num_images: int, name: str, device: str, dtype: torch.dtype
) -> Iterator[Case]:
    import transformers

    theirs = transformers.ViTForImageClassification
    models = same_weights(ViT, config, theirs, device, dtype)
    size = config.image_size
    pixels = torch.randn(num_images, 3, size, size, device=device, dtype=dtype)
    labels = torch.randint(0, config.num_labels, (num_images,), device=device)
    tokens = num_images * (1 + config.grid[0] * config.grid[1])
    steps = {
        "forward": (tokens, lambda model, inputs: lambda: logits(model, inputs)),
        "train step": (tokens, train_step(loss, "projection.weight")),
    }
    inputs = {"pixel_values": pixels, "labels": labels}
    shape = f"{name} {num_images} images"
    yield from model_cases("vit", shape, models, inputs, steps)


@torch.inference_mode()
def logits(model: Any, inputs: Inputs) -> Tensor:
    y: Tensor = model(inputs["pixel_values"]).logits
    return y


def loss(model: Any, inputs: Inputs) -> Tensor:
    value: Tensor = model(**inputs).loss
    return value
