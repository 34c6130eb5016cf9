"""BLIP-2 from pixels to logits against transformers with the very same weights."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.case import Case
from bench.whole import Inputs, model_cases, same_weights, train_step
from vlmkernels.models.blip2 import Blip2, Blip2Config


def cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    large = device.startswith("cuda")
    note = "" if large else " (2 + 2 + 1 layers, 112 px, vocabulary 8192)"
    for name in ("opt-2.7b", "flan-t5-xl", "itm-vit-g") if large else ("opt-2.7b", "itm-vit-g"):
        config = Blip2Config.preset(name)
        if not large:
            config = small(config)
        batch = 8 if large else 2
        for case in cases_of(config, (batch, 32), f"blip2_{name}{note}", device, dtype):
            if large or case.direction == "forward":  # on a CPU a training step takes too long
                yield case


def small(config: Blip2Config) -> Blip2Config:
    """One of a few layers that a CPU gets through; their widths are the published ones."""
    text: Any = config.text
    if text is not None:
        depth = "num_layers" if hasattr(text, "num_layers") else "num_hidden_layers"
        text = replace(text, **{depth: 1, "vocab_size": 8192, "eos_token_id": 2})
        if hasattr(text, "num_decoder_layers"):
            text.num_decoder_layers = 1
    return replace(
        config,
        image_token_index=None if text is None else 8000,
        vision=replace(config.vision, num_hidden_layers=2, image_size=112),
        qformer=replace(config.qformer, num_hidden_layers=2),
        text=text,
    )


def cases_of(
    config: Blip2Config, sizes: tuple[int, int], name: str, device: str, dtype: torch.dtype
) -> Iterator[Case]:
    """sizes: batch, and tokens of text of each row, behind the placeholders of its one image."""
    import transformers

    theirs = getattr(transformers, config.architecture)
    models = same_weights(Blip2.model_class(config), config, theirs, device, dtype)
    (batch, num_text), size = sizes, config.vision.image_size
    ids = torch.randint(3, 8000, (batch, num_text))
    if config.image_token_index is not None:
        image = torch.full((batch, config.num_query_tokens), config.image_token_index)
        ids = torch.cat([image, ids], dim=1)
    inputs: dict[str, Any] = {
        "pixel_values": torch.randn(batch, 3, size, size).to(device, dtype),
        "input_ids": ids.to(device),
        "attention_mask": torch.ones_like(ids).to(device),
    }
    loss = contrast if config.text is None else generation
    if config.text is not None:
        inputs["labels"] = inputs["input_ids"]
    steps = {
        "forward": (ids.numel(), forward),
        "train step": (ids.numel(), train_step(loss, "query_tokens")),
    }
    yield from model_cases("blip2", f"{name} {batch} x {num_text} text", models, inputs, steps)


def forward(model: Any, inputs: Inputs) -> Callable[[], Tensor]:
    @torch.inference_mode()
    def run() -> Tensor:
        out = model(**inputs)
        y: Tensor = out.logits_per_image if hasattr(out, "logits_per_image") else out.logits
        return y

    return run


def generation(model: Any, inputs: Inputs) -> Tensor:
    value: Tensor = model(**inputs).loss
    return value


def contrast(model: Any, inputs: Inputs) -> Tensor:
    logits = model(**inputs).logits_per_image
    return torch.nn.functional.cross_entropy(
        logits / 0.07, torch.arange(len(logits), device=logits.device)
    )
