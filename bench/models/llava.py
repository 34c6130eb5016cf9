"""LLaVA-1.5 from pixels to logits against transformers with the very same weights."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.case import Case
from bench.whole import (
    DECODE_STEPS,
    Inputs,
    decode,
    model_cases,
    prefill,
    same_weights,
    train_step,
)
from vlmkernels.models.llava import Llava, LlavaConfig


def cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    config = LlavaConfig.preset("7B")
    if device.startswith("cuda"):
        yield from cases_of(config, (4, 448), "llava15_7b", device, dtype)
    else:
        config.text = replace(config.text, num_hidden_layers=1, vocab_size=8192)
        config.text.pad_token_id = None
        config.vision = replace(config.vision, num_hidden_layers=3, image_size=112)
        config = replace(config, image_token_index=8000)
        name = "llava15_7b (1 + 3 layers, 112 px, vocabulary 8192)"
        yield from cases_of(config, (1, 64), name, device, dtype)


def cases_of(
    config: LlavaConfig, sizes: tuple[int, int], name: str, device: str, dtype: torch.dtype
) -> Iterator[Case]:
    """sizes: batch, and tokens of text behind the one image of each row."""
    import transformers

    theirs = transformers.LlavaForConditionalGeneration
    models = same_weights(Llava, config, theirs, device, dtype)
    (batch, num_text), vision = sizes, config.vision
    image = torch.full((batch, vision.grid[0] * vision.grid[1]), config.image_token_index)
    ids = torch.cat([image, torch.randint(3, 8000, (batch, num_text))], dim=1).to(device)
    pixels = torch.randn(batch, 3, vision.image_size, vision.image_size).to(device, dtype)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels,
    }
    steps = {
        "prefill": (ids.numel(), prefill),
        "decode": (batch * DECODE_STEPS, decode),
        "train step": (ids.numel(), train_step(loss, "linear_1.weight")),
    }
    shape = f"{name} {batch} x ({num_text} text + {image.shape[1]} features)"
    yield from model_cases("llava", shape, models, inputs, steps)


def loss(model: Any, inputs: Inputs) -> Tensor:
    labels = inputs["input_ids"].clone()
    labels[inputs["input_ids"] == model.config.image_token_index] = -100
    value: Tensor = model(**inputs, labels=labels).loss
    return value
