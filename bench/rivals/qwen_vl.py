"""Qwen-VL in plain PyTorch, as its published code computes it: transformers has no such model.

It takes this package's weights under their published names, and can be called like a model of
transformers. Attention is PyTorch's, or by products and softmax as in the published code.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmkernels.models.qwen_vl import QwenVLConfig


@dataclass
class Output:
    logits: Tensor
    past_key_values: "Cache | None"
    loss: Tensor | None = None


class Cache:
    """Keys and values (batch, num_heads, seqlen, head_dim) of every layer, which grow."""

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha  # of dynamic NTK: the prompt's
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def seqlen(self) -> int:
        return self.layers[0][0].shape[2] if self.layers else 0

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if layer in self.layers:
            k, v = (torch.cat(pair, 2) for pair in zip(self.layers[layer], (k, v), strict=True))
        self.layers[layer] = (k, v)
        return k, v

    def crop(self, remove: int) -> None:
        """remove: minus the number of tokens that go."""
        self.layers = {i: (k[:, :, :remove], v[:, :, :remove]) for i, (k, v) in self.layers.items()}


class PlainQwenVL:
    """weights: published name -> tensor. sdpa: PyTorch's choice of attention kernel."""

    def __init__(self, weights: Mapping[str, Tensor], config: QwenVLConfig, *, sdpa: bool) -> None:
        self.weights, self.config, self.sdpa = dict(weights), config, sdpa
        self.training = False

    @property
    def model(self) -> "PlainQwenVL":
        return self  # transformers' models hold theirs so

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, x) for name, x in self.weights.items() if x.requires_grad)

    def __call__(
        self,
        input_ids: Tensor,
        *,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> Output:
        x = F.embedding(input_ids, self.weights["transformer.wte.weight"])
        if pixel_values is not None:
            start = self.config.visual.image_start_id
            x = x.clone()
            places = zip(
                *(input_ids == start).nonzero(as_tuple=True), self.vision(pixel_values), strict=True
            )
            for row, column, features in places:
                x[row, column + 1 : column + 1 + len(features)] = features
        cache = past_key_values or (Cache(self._alpha(x.shape[1])) if use_cache else None)
        x = self.language(x, cache)[:, -logits_to_keep:]
        logits = F.linear(x, self.weights["lm_head.weight"])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return Output(logits, cache, loss)

    def vision(self, pixel_values: Tensor) -> Tensor:
        w, visual = _under(self.weights, "transformer.visual."), self.config.visual
        x = F.conv2d(pixel_values, w["conv1.weight"], stride=visual.patch_size)
        x = x.flatten(2).transpose(1, 2)
        x = x + _resized(w["positional_embedding"], x.shape[1])
        x = _layer_norm(x, w, "ln_pre")
        for i in range(visual.layers):
            x = self._block(x, _under(w, f"transformer.resblocks.{i}."))
        w_pool = _under(w, "attn_pool.")
        x = _layer_norm(F.linear(x, w_pool["kv_proj.weight"]), w_pool, "ln_kv")
        q = _layer_norm(w_pool["query"], w_pool, "ln_q") + w_pool["pos_embed"]
        inputs = (q.expand(len(x), -1, -1), x + _resized(w_pool["pos_embed"], x.shape[1]), x)
        weights = w_pool["attn.in_proj_weight"].chunk(3), w_pool["attn.in_proj_bias"].chunk(3)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (-1, 128)).transpose(1, 2)
            for x, weight, bias in zip(inputs, *weights, strict=True)
        )
        x = _linear(self._attend(q, k, v), w_pool, "attn.out_proj")
        return _layer_norm(x, w, "ln_post") @ w["proj"]

    def _block(self, x: Tensor, w: Mapping[str, Tensor]) -> Tensor:
        qkv = _linear(_layer_norm(x, w, "ln_1"), w, "attn.in_proj")
        q, k, v = qkv.unflatten(-1, (self.config.visual.heads, -1)).transpose(1, 2).chunk(3, -1)
        x = x + _linear(self._attend(q, k, v), w, "attn.out_proj")
        y = _linear(F.gelu(_linear(_layer_norm(x, w, "ln_2"), w, "mlp.c_fc")), w, "mlp.c_proj")
        return x + y

    def language(self, x: Tensor, cache: Cache | None) -> Tensor:
        past, length = cache.seqlen if cache else 0, x.shape[1]
        alpha = cache.alpha if cache else self._alpha(length)
        rotation = self._rotation(torch.arange(past, past + length, device=x.device), alpha)
        for i in range(self.config.num_hidden_layers):
            w = _under(self.weights, f"transformer.h.{i}.")
            x = x + self._attention(self._rms_norm(x, w["ln_1.weight"]), w, rotation, (cache, i))
            y = self._rms_norm(x, w["ln_2.weight"])
            y = F.linear(y, w["mlp.w1.weight"]) * F.silu(F.linear(y, w["mlp.w2.weight"]))
            x = x + F.linear(y, w["mlp.c_proj.weight"])
        return self._rms_norm(x, self.weights["transformer.ln_f.weight"])

    def _attention(
        self,
        x: Tensor,
        w: Mapping[str, Tensor],
        rotation: tuple[Tensor, Tensor],
        place: tuple[Cache | None, int],
    ) -> Tensor:
        heads = (self.config.num_heads, self.config.head_dim)
        q, k, v = (
            y.unflatten(-1, heads).transpose(1, 2) for y in _linear(x, w, "attn.c_attn").chunk(3, 2)
        )
        q, k = (_rotated(y, *rotation) for y in (q, k))
        cache, layer = place
        if cache is not None:
            k, v = cache.update(layer, k, v)
        base = self.config.seq_length
        if self.config.use_logn_attn and not self.training and k.shape[2] > base:
            n = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=x.device) + 1
            q = q * (n.log() / math.log(base)).clamp(min=1).to(q.dtype)[:, None]
        return F.linear(self._attend(q, k, v, causal=q.shape[2] > 1), w["attn.c_proj.weight"])

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
        """(batch, num_heads, seqlen, head_dim) -> (batch, seqlen, num_heads * head_dim)"""
        if self.sdpa:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        else:
            scores = q @ k.mT / q.shape[-1] ** 0.5
            if causal:
                later = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
                scores = scores.masked_fill(later, -torch.inf)
            out = scores.softmax(-1) @ v
        return out.transpose(1, 2).flatten(2)

    def _alpha(self, length: int) -> float:
        if self.training or not self.config.use_dynamic_ntk:
            return 1.0
        steps = math.ceil(math.log2(length / self.config.seq_length) + 1)
        return max(2.0**steps - 1, 1.0)

    def _rotation(self, positions: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        dim = self.config.head_dim
        base = self.config.rotary_emb_base * alpha ** (dim / (dim - 2))
        exponents = torch.arange(0, dim, 2, device=positions.device).float() / dim
        angles = positions.float()[:, None] / base**exponents
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()

    def _rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.config.layer_norm_epsilon)
        return y.to(x.dtype) * weight


def _under(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): x for k, x in weights.items() if k.startswith(prefix)}


def _linear(x: Tensor, w: Mapping[str, Tensor], name: str) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def _layer_norm(x: Tensor, w: Mapping[str, Tensor], name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)


def _resized(table: Tensor, num_tokens: int) -> Tensor:
    source, target = math.isqrt(len(table)), math.isqrt(num_tokens)
    if source == target:
        return table
    image = table.float().view(1, source, source, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, (target, target), mode="bicubic", align_corners=False)
    return image.flatten(2)[0].T.to(table.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y = x.float()
    first, second = y.chunk(2, dim=-1)
    return (y * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)
