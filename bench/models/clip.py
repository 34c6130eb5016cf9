"""CLIP similarities and contrastive training step against transformers with the same weights."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.case import Case
from bench.whole import Inputs, model_cases, same_weights, train_step
from vlmkernels.models.clip import Clip, ClipConfig


def cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    if device.startswith("cuda"):
        yield from cases_of(ClipConfig.preset("L/14-336"), 64, "clip_l_14_336", device, dtype)
    else:
        config = ClipConfig.preset("B/16")
        config.vision.num_hidden_layers = config.text.num_hidden_layers = 3
        config.text.vocab_size, config.text.eos_token_id = 8192, 8191
        name = "clip_b_16 (3 layers each, vocabulary 8192)"
        yield from cases_of(config, 4, name, device, dtype)


def cases_of(
    config: ClipConfig, num_pairs: int, name: str, device: str, dtype: torch.dtype
) -> Iterator[Case]:
    import transformers

    models = same_weights(Clip, config, transformers.CLIPModel, device, dtype)
    seqlen, size = 32, config.vision.image_size
    ids = torch.randint(0, 8000, (num_pairs, seqlen), device=device)
    ids[:, -1] = config.text.eos_token_id
    pixels = torch.randn(num_pairs, 3, size, size, device=device, dtype=dtype)
    tokens = num_pairs * (seqlen + 1 + config.vision.grid[0] * config.vision.grid[1])
    steps = {
        "forward": (tokens, lambda model, inputs: lambda: logits(model, inputs)),
        "train step": (tokens, train_step(loss, "patch_embedding.weight")),
    }
    inputs = {"input_ids": ids, "pixel_values": pixels}
    yield from model_cases("clip", f"{name} {num_pairs} pairs", models, inputs, steps)


@torch.inference_mode()
def logits(model: Any, inputs: Inputs) -> Tensor:
    y: Tensor = model(**inputs).logits_per_image
    return y


def loss(model: Any, inputs: Inputs) -> Tensor:
    value: Tensor = model(**inputs, return_loss=True).loss
    return value
