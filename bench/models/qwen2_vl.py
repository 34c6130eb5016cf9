"""Qwen2-VL from pixels to logits, against transformers with the very same (random) weights.

Both models hold the same tensors, so that two fit where one does. On a CPU the published widths
are kept; layers and vocabulary are cut, which the shape says.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.case import Case
from vlmkernels.models.qwen2_vl import Qwen2VL, Qwen2VLConfig

NOTE = "Whole models run with random weights of published sizes."
DECODE_STEPS = 8
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
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2VL(config).to(dtype).eval()
    inputs = make_inputs(config, batch, num_text, grid, device, dtype)
    tokens = inputs["input_ids"].numel()
    theirs = {"eager": "eager", "transformers SDPA": "sdpa"}
    others = {variant: hf_model(model, kind) for variant, kind in theirs.items()}
    steps: dict[str, tuple[int, Callable[[Any, Inputs], Callable[[], Any]]]] = {
        "prefill": (tokens, prefill),
        "decode": (batch * DECODE_STEPS, decode),
        "train step": (tokens, train_step),
    }
    for direction, (count, make) in steps.items():
        runs = {"vlmkernels": model, **others}
        yield Case(
            op="qwen2_vl",
            shape=f"{name} {batch} x ({num_text} text + {grid}x{grid} patches)",
            dtype=str(dtype).removeprefix("torch."),
            direction=direction,
            bytes=0,
            flops=0,
            variants={variant: make(run, inputs) for variant, run in runs.items()},
            tokens=count,
            note=NOTE,
        )


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
    config = transformers.Qwen2VLConfig.from_dict(raw)
    with torch.device("meta"):
        make: Any = transformers.Qwen2VLForConditionalGeneration._from_config
        theirs = make(config, attn_implementation=attention)
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


@torch.inference_mode()
def _prefilled(model: Any, inputs: Inputs) -> tuple[Tensor, Any]:
    if isinstance(model, Qwen2VL):
        return model.prefill(DECODE_STEPS + 1, **inputs)
    out = model(**inputs, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1], out.past_key_values


def prefill(model: Any, inputs: Inputs) -> Callable[[], Tensor]:
    """Logits of the token after the prompt; the KV cache is filled."""
    return lambda: _prefilled(model, inputs)[0]


def decode(model: Any, inputs: Inputs) -> Callable[[], Tensor]:
    """The same few tokens after the prompt, one at a time; logits of the last."""
    ids = inputs["input_ids"]
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 1000, (DECODE_STEPS, len(ids)), generator=generator).to(ids.device)
    run = _decode_ours if isinstance(model, Qwen2VL) else _decode_theirs
    state: list[Any] = []

    def start_then_run() -> Tensor:
        if not state:  # not at once: the prompt's memory belongs to the variant that runs
            state.append(_prefilled(model, inputs)[1])
        return run(model, inputs, tokens, state[0])

    return start_then_run


@torch.inference_mode()
def _decode_ours(model: Any, inputs: Inputs, tokens: Tensor, state: Any) -> Tensor:
    seqlens, positions = state.cache.seqlens, state.next_positions
    for token in tokens:
        logits = model.decode(token, state)
    state.cache.seqlens, state.next_positions = seqlens, positions
    return logits  # type: ignore[no-any-return]


@torch.inference_mode()
def _decode_theirs(model: Any, inputs: Inputs, tokens: Tensor, cache: Any) -> Tensor:
    length = inputs["input_ids"].shape[1]
    for i, token in enumerate(tokens):
        delta = model.model.rope_deltas
        positions = (length + i + delta).expand(3, -1, -1)
        out = model(
            input_ids=token[:, None],
            past_key_values=cache,
            position_ids=positions,
            use_cache=True,
        )
    cache.crop(-len(tokens))
    return out.logits[:, -1]  # type: ignore[no-any-return]


def train_step(model: Any, inputs: Inputs) -> Callable[[], Any]:
    """Loss and gradients of all parameters, without the optimizer, which is PyTorch's in both."""
    return partial(_loss_and_gradients, model, inputs)


def _loss_and_gradients(model: Any, inputs: Inputs) -> tuple[Tensor, Tensor]:
    labels = inputs["input_ids"].masked_fill(inputs["mm_token_type_ids"] != 0, -100)
    parameters = dict(model.named_parameters())
    loss = model(**inputs, labels=labels).loss
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    of = dict(zip(parameters, gradients, strict=True))
    watched = next(name for name in of if name.endswith("patch_embed.proj.weight"))
    return loss.detach(), of[watched]
