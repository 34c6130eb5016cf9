"""Qwen2-VL from pixels to logits, against transformers with the very same (random) weights.

Both models hold the same tensors, so that two fit where one does. On a CPU the published widths
are kept; layers and vocabulary are cut, which the shape says.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.case import Case
from bench.whole import DECODE_STEPS, decode, model_cases, prefill, train_step
from vlmkernels.models.qwen2_5_vl import Qwen25VL, Qwen25VLConfig
from vlmkernels.models.qwen2_vl import Qwen2VL, Qwen2VLConfig

Inputs = dict[str, Tensor]


def cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    if device.startswith("cuda"):
        config = Qwen2VLConfig.preset("2B")
        yield from cases_of(config, (4, 1024, 64), "qwen2vl_2b", device, dtype)
    else:
        ids: dict[str, Any] = {"image_token_id": 8000, "video_token_id": 8001}
        ids |= {"vision_start_token_id": 8002, "bos_token_id": 8003, "eos_token_id": 8004}
        config = replace(Qwen2VLConfig.preset("2B"), num_hidden_layers=2, vocab_size=8192, **ids)
        config.vision.depth = 2
        name = "qwen2vl_2b (2 layers each, vocabulary 8192)"
        yield from cases_of(config, (1, 192, 16), name, device, dtype)


def cases_of(
    config: Qwen2VLConfig, sizes: tuple[int, int, int], name: str, device: str, dtype: torch.dtype
) -> Iterator[Case]:
    """sizes: batch, tokens of text in each row, rows and columns of patches of its one image."""
    batch, num_text, grid = sizes
    newer = isinstance(config, Qwen25VLConfig)
    torch.manual_seed(0)
    with torch.device(device):
        model = (Qwen25VL if newer else Qwen2VL)(config).to(dtype).eval()
    inputs = make_inputs(config, batch, num_text, grid, device, dtype)
    tokens = inputs["input_ids"].numel()
    theirs = {"eager": "eager", "transformers SDPA": "sdpa"}
    others = {variant: hf_model(model, kind) for variant, kind in theirs.items()}
    steps = {
        "prefill": (tokens, prefill),
        "decode": (batch * DECODE_STEPS, decode),
        "train step": (tokens, train_step(loss_of, "patch_embed.proj.weight")),
    }
    shape = f"{name} {batch} x ({num_text} text + {grid}x{grid} patches)"
    yield from model_cases(config.model_type, shape, {"vlmkernels": model, **others}, inputs, steps)


def make_inputs(
    config: Qwen2VLConfig, batch: int, num_text: int, grid: int, device: str, dtype: torch.dtype
) -> Inputs:
    """Random text with one random image in front of it, in every row."""
    merged = (grid // config.vision.spatial_merge_size) ** 2
    image = torch.full((batch, merged), config.image_token_id)
    text = torch.randint(0, 1000, (batch, num_text))
    start = torch.full((batch, 1), config.vision_start_token_id)
    ids = torch.cat([start, image, text], dim=1)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(batch * grid * grid, config.vision.patch_dim).to(dtype),
        "image_grid_thw": torch.tensor([[1, grid, grid]] * batch),
        "mm_token_type_ids": (ids == config.image_token_id).long(),
    }
    return {key: x.to(device) for key, x in inputs.items()}


def hf_model(model: Qwen2VL, attention: str) -> Any:
    """transformers' Qwen2-VL whose parameters are views of this model's."""
    import transformers

    raw = model.config.to_dict()
    make: Any = getattr(transformers, model.config.architecture)
    config = make.config_class.from_dict(raw)
    with torch.device("meta"):
        theirs = make._from_config(config, attn_implementation=attention)
    shared = {}
    for key, x in model.state_dict().items():
        prefix = "model." if key.startswith("visual.") else "model.language_"
        shared[key if key.startswith("lm_head.") else prefix + key] = x
    if model.config.tie_word_embeddings:
        shared["lm_head.weight"] = shared["model.language_model.embed_tokens.weight"]
    theirs.load_state_dict(shared, assign=True)
    for module in theirs.modules():  # frequencies are no weights: they are still on "meta"
        for key, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                _materialize(module, key, model.device)
    return theirs.eval()


def _materialize(module: Any, key: str, device: torch.device) -> None:
    fresh = type(module)(*_arguments(module)).get_buffer(key)
    module.register_buffer(key, fresh.to(device), persistent=False)


def _arguments(module: Any) -> tuple[Any, ...]:
    return (module.config,) if hasattr(module, "config") else (module.dim, module.theta)


def loss_of(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    labels = inputs["input_ids"].masked_fill(inputs["mm_token_type_ids"] != 0, -100)
    loss: Tensor = model(**inputs, labels=labels).loss
    return loss
