"""Qwen-VL from pixels to logits against plain PyTorch with the very same weights."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.case import Case
from bench.rivals.qwen_vl import PlainQwenVL
from bench.whole import DECODE_STEPS, Inputs, decode, model_cases, prefill, train_step
from vlmkernels.models.qwen_vl import QwenVL, QwenVLConfig
from vlmkernels.models.qwen_vl.weights import published_name


def cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    config = QwenVLConfig.preset("9.6B")
    if device.startswith("cuda"):
        yield from cases_of(config, (4, 448), "qwen_vl", device, dtype)
    else:
        sizes = {"layers": 2, "image_size": 112, "n_queries": 64}
        visual = replace(config.visual, image_start_id=8000, **sizes)
        config = replace(config, num_hidden_layers=1, vocab_size=8192, visual=visual)
        name = "qwen_vl (1 + 2 layers, 112 px to 64 queries, vocabulary 8192)"
        yield from cases_of(config, (1, 64), name, device, dtype)


def cases_of(
    config: QwenVLConfig, sizes: tuple[int, int], name: str, device: str, dtype: torch.dtype
) -> Iterator[Case]:
    """sizes: batch, and tokens of text behind the one image of each row."""
    (batch, num_text), visual = sizes, config.visual
    torch.manual_seed(0)
    with torch.device(device):
        model = QwenVL(config).to(dtype).eval()
    own = {published_name(name): x for name, x in model.named_parameters()}
    models: dict[str, Any] = {"vlmkernels": model}
    models |= {"eager": PlainQwenVL(own, config, sdpa=False)}
    models |= {"PyTorch SDPA": PlainQwenVL(own, config, sdpa=True)}
    start = visual.image_start_id
    image = [start, *[start + 2] * visual.n_queries, start + 1]
    ids = torch.tensor(image).expand(batch, -1)
    ids = torch.cat([ids, torch.randint(0, 8000, (batch, num_text))], dim=1).to(device)
    size = visual.image_size
    inputs = {
        "input_ids": ids,
        "pixel_values": torch.randn(batch, 3, size, size).to(device, dtype),
    }
    steps = {
        "prefill": (ids.numel(), prefill),
        "decode": (batch * DECODE_STEPS, decode),
        "train step": (ids.numel(), train_step(loss, "kv_proj.weight")),
    }
    shape = f"{name} {batch} x ({num_text} text + {visual.n_queries} queries)"
    yield from model_cases("qwen_vl", shape, models, inputs, steps)


def loss(model: Any, inputs: Inputs) -> Tensor:
    labels = inputs["input_ids"]
    labels = labels.masked_fill(labels >= model.config.visual.image_start_id, -100)
    value: Tensor = model(**inputs, labels=labels).loss
    return value
