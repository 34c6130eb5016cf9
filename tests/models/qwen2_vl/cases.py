"""The inputs that both implementations get: images, videos, text, padding, packed documents."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.models.common import picture
from vlmkernels.models.qwen2_vl import Qwen2VL, Qwen2VLProcessor

IMAGE, VIDEO = (
    "<|vision_start|><|image_pad|><|vision_end|>",
    "<|vision_start|><|video_pad|><|vision_end|>",
)
Inputs = dict[str, Any]


def video(num_frames: int, height: int, width: int) -> np.ndarray:
    return np.stack([picture(height, width, seed) for seed in range(num_frames)])


def make(name: str, processor: Qwen2VLProcessor) -> Inputs:
    """Arguments of both models for a named case; for video with explicit position_ids."""
    wide, tall = picture(56, 112), picture(140, 56, seed=1)
    if name == "one_image":
        return processor(f"What is in the picture? {IMAGE} Describe", [wide])
    if name == "two_images":
        return processor(f"{IMAGE} and {IMAGE}What is in the two?", [wide, tall])
    if name == "text":
        return processor("What is in the picture?")
    if name in ("padded_left", "padded_right"):
        texts = [f"a {IMAGE} What? {IMAGE} in", "Describe the two videos", f"{IMAGE}user"]
        side = name.removeprefix("padded_")
        return processor(texts, [wide, tall, tall], padding_side=side)
    if name == "video":
        # 5 time steps on a merged grid of 2 x 2: the published rule and transformers' differ.
        return processor(f"What {VIDEO} is it?", videos=[video(9, 56, 56)])
    if name == "image_and_video":
        return processor(f"{VIDEO} and {IMAGE} is?", [tall], [video(3, 56, 84)])
    raise KeyError(name)


CASES = (
    *("one_image", "two_images", "text", "padded_left", "padded_right", "video"),
    "image_and_video",
)


def for_transformers(inputs: Inputs, model: Qwen2VL) -> Inputs:
    """The same arguments, positions by the published rule where transformers has another."""
    if "video_grid_thw" not in inputs:
        return inputs
    return inputs | {"position_ids": positions(inputs, model)[0]}


def positions(inputs: Inputs, model: Qwen2VL) -> tuple[Tensor, Tensor]:
    from vlmkernels.models.qwen2_vl import mrope_position_ids

    return mrope_position_ids(
        inputs["input_ids"],
        image_token_id=model.config.image_token_id,
        video_token_id=model.config.video_token_id,
        image_grid_thw=inputs.get("image_grid_thw"),
        video_grid_thw=inputs.get("video_grid_thw"),
        attention_mask=inputs["attention_mask"],
    )


def labels_for(inputs: Inputs) -> Tensor:
    """Loss on text tokens, the first of each row aside: nothing stands before it."""
    labels = inputs["input_ids"].clone()
    mask = inputs["attention_mask"]
    labels[(mask == 0) | (inputs["mm_token_type_ids"] != 0)] = -100
    labels[torch.arange(len(labels)), mask.argmax(dim=1)] = -100
    return labels
