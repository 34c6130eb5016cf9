"""Small calls that reach every CUDA kernel, for `bench.counted`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.case import forward, gradient
from vlmkernels import ops

Add = Callable[..., None]


def calls() -> dict[str, Callable[[], Callable[[], Any]]]:
    """Name -> what prepares the function to count."""
    torch.manual_seed(0)
    found: dict[str, Callable[[], Callable[[], Any]]] = {}

    def add(name: str, function: Callable[..., Any], **inputs: Any) -> None:
        found[f"{name} fwd"] = partial(forward, function, inputs)
        if any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs.values()):
            found[f"{name} bwd"] = partial(gradient, function, inputs)

    add("null 1 MiB", ops.null, x=rand(1 << 19, grad=False))
    for room in (_attention, _rotary, _rows, _images, _matches):
        room(add)
    return found


def rand(*shape: int, grad: bool = True) -> torch.Tensor:
    return torch.randn(shape).bfloat16().requires_grad_(grad)


def _attention(add: Add) -> None:
    for dim, causal in ((128, True), (80, False)):
        qkv = {name: rand(1, 512, 2, dim) for name in "qkv"}
        kind = "causal" if causal else "full"
        add(f"attention 1x512x2x{dim} {kind}", ops.attention, **qkv, causal=causal)
    qkv = {name: rand(1, 512, 2, 128) for name in "qkv"}
    documents = {"segment_ids": (torch.arange(512, dtype=torch.int32) // 128)[None]}
    name = "attention 1x512x2x128 causal, 4 documents"
    add(name, ops.attention, **qkv, causal=True, **documents)
    add("attention 1x512x2x128 bias", ops.attention, **qkv, bias=rand(1, 2, 512, 512))
    cache = {name: rand(1, 1024, 1, 128, grad=False) for name in ("k_cache", "v_cache")}
    new = {"q": rand(1, 1, 4, 128, grad=False)}
    seqlens = {"cache_seqlens": torch.tensor([1000], dtype=torch.int32)}
    add("attention_decode 1x1000x4+1x128", ops.attention_decode, **new, **cache, **seqlens)
    weights = {"weight_k": rand(128, 512), "weight_v": rand(128, 512)}
    queries = {"q": rand(1, 32, 2, 64), "x": rand(1, 257, 512)}
    add("qformer_attention 1x32x257x512", ops.qformer_attention, **queries, **weights)


def _rotary(add: Add) -> None:
    positions = torch.arange(256).repeat(3, 1)
    text = {"q": rand(256, 8, 128), "k": rand(256, 2, 128)}
    add("mrope 256x8+2x128", ops.mrope, **text, position_ids=positions, sections=(16, 24, 24))
    normed = {**text, "q_weight": rand(128), "k_weight": rand(128), "interleaved": True}
    sections = {"position_ids": positions, "sections": (24, 20, 20)}
    add("qk_norm_rope 256x8+2x128", ops.qk_norm_rope, **normed, **sections)
    packed = {"qkv": rand(256, 3, 4, 80), "position_ids": positions[:2]}
    add("vision_rope_qkv 256x3x4x80", ops.vision_rope_qkv, **packed)


def _rows(add: Add) -> None:
    add("gelu 256x5120", ops.gelu, x=rand(256, 5120))
    add("swiglu 256x3420", ops.swiglu, gate=rand(256, 3420), up=rand(256, 3420))
    add("rms_norm 256x3584", ops.rms_norm, x=rand(256, 3584), weight=rand(3584))
    layer = {"x": rand(256, 1280), "weight": rand(1280), "bias": rand(1280)}
    add("layer_norm 256x1280", ops.layer_norm, **layer)


def _images(add: Add) -> None:
    add("patch_embed 128x1176 to 256", ops.patch_embed, x=rand(128, 1176), weight=rand(256, 1176))
    images = torch.randint(0, 256, (1, 3, 112, 112), dtype=torch.uint8)
    how: dict[str, Any] = {"mean": [0.5] * 3, "std": [0.5] * 3, "merge_size": 2}
    frames = rand(256, 3, 2, 14, 14)
    add("patch_embed_pixels 64x588", ops.patch_embed_pixels, images=images, weight=frames, **how)


def _matches(add: Add) -> None:
    features = {"image_features": rand(256, 512), "text_features": rand(256, 512)}
    scalars = {"logit_scale": torch.tensor(0.1, requires_grad=True)}
    add("clip_loss 256x512", ops.clip_loss, **features, **scalars)
    bias = {"logit_bias": torch.tensor(-5.0, requires_grad=True)}
    add("siglip_loss 256x512", ops.siglip_loss, **features, **scalars, **bias)
    codes = {"z": rand(256, 64, grad=False), "codebook": rand(1024, 64, grad=False)}
    add("vq_lookup 256x1024x64", ops.vq_lookup, **codes)
