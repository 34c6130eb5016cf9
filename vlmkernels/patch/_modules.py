"""The swaps that families share. Where parameters and input differ in dtype, or a Linear has been
replaced (LoRA, quantization), the forward that was there runs."""

from typing import Any

import torch
from torch import Tensor

from vlmkernels import nn, ops
from vlmkernels.compat import transformers as compat
from vlmkernels.patch._swap import Swap, original, rebound

_RMS_NORM = frozenset(
    ["dtype", "to", "torch", "float32", "pow", "mean", "rsqrt", "variance_epsilon", "weight"]
)
_GATED_MLP = frozenset(["down_proj", "act_fn", "gate_proj", "up_proj"])
_SILU = ("SiLUActivation", "SiLU")


def _layer_norm(cls: Any) -> dict[str, Any]:
    before = cls.forward

    def forward(self: Any, input: Tensor) -> Tensor:
        if self.weight.dtype != input.dtype:
            return before(self, input)  # type: ignore[no-any-return]
        return ops.layer_norm(input, self.weight, self.bias, eps=self.eps)  # type: ignore[no-any-return]

    return {"forward": forward}


def _no_layer_norm(module: Any, name: str) -> str | None:
    if len(module.normalized_shape) != 1:
        return f"it normalises {len(module.normalized_shape)} dimensions"
    return "it has no weight" if module.weight is None else None


def _rms_norm(cls: Any) -> dict[str, Any]:
    before = cls.forward

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if self.weight.dtype != hidden_states.dtype:
            return before(self, hidden_states)  # type: ignore[no-any-return]
        return ops.rms_norm(hidden_states, self.weight, eps=self.variance_epsilon)  # type: ignore[no-any-return]

    return {"forward": forward}


def _quick_gelu(cls: Any) -> dict[str, Any]:
    return {"forward": lambda self, input: ops.quick_gelu(input)}


def _gelu(cls: Any) -> dict[str, Any]:
    return {"forward": lambda self, input: ops.gelu(input)}


def _gelu_tanh(cls: Any) -> dict[str, Any]:
    return {"forward": lambda self, input: ops.gelu(input, approximate="tanh")}


def _torch_gelu(cls: Any) -> dict[str, Any]:
    return {"forward": lambda self, input: ops.gelu(input, approximate=self.approximate)}


def _swiglu_mlp(cls: Any) -> dict[str, Any]:
    return {"forward": nn.SwiGLUMLP.forward}


def _no_swiglu_mlp(module: Any, name: str) -> str | None:
    act = original(type(module.act_fn)).__name__
    return None if act in _SILU else f"its activation is {act}, not SiLU"


def _patch_embed(cls: Any) -> dict[str, Any]:
    def forward(self: Any, input: Tensor) -> Tensor:
        grid = [n // k for n, k in zip(input.shape[2:], self.kernel_size, strict=True)]
        x = input.flatten(1) if tuple(input.shape[2:]) == self.kernel_size else input
        tokens = ops.patch_embed(x, self.weight, self.bias)
        tokens = tokens.unsqueeze(1) if tokens.ndim == 2 else tokens
        return tokens.transpose(1, 2).unflatten(2, grid)  # type: ignore[no-any-return]

    return {"forward": forward}


def _no_patch_embed(module: Any, name: str) -> str | None:
    patches = all(k > 1 for k in module.kernel_size[-2:])
    plain = (
        tuple(module.stride) == tuple(module.kernel_size)
        and module.padding in ("valid", (0,) * len(module.kernel_size))
        and set(module.dilation) == {1}
        and module.groups == 1
    )
    return None if patches and plain else "it is not a convolution of patches"


def _apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    q, k = ops.rope_from_tables(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return q.transpose(1, 2), k.transpose(1, 2)


def _rope(cls: type) -> dict[str, Any]:
    return rebound(cls, apply_rotary_pos_emb=_apply_rotary_pos_emb)


def _apply_rotary_pos_emb_vision(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    return ops.rope_from_tables(q, k, cos, sin)


def _vision_rope(cls: type) -> dict[str, Any]:
    return rebound(cls, apply_rotary_pos_emb_vision=_apply_rotary_pos_emb_vision)


def _packed_attention(cls: Any) -> dict[str, Any]:
    asked = cls.forward.__globals__["is_flash_attention_requested"]

    def is_flash_attention_requested(config: Any) -> bool:
        return bool(config._attn_implementation == compat.NAME or asked(config))

    return rebound(cls, is_flash_attention_requested=is_flash_attention_requested)


layer_norm = Swap("norm", _layer_norm, _no_layer_norm)
rms_norm = Swap("norm", _rms_norm, reads=_RMS_NORM)
quick_gelu = Swap("activation", _quick_gelu, reads=frozenset(["torch", "sigmoid"]))
gelu = Swap("activation", _gelu, reads=frozenset(["act"]))
gelu_tanh = Swap("activation", _gelu_tanh, reads=frozenset(["act"]))
torch_gelu = Swap("activation", _torch_gelu)
swiglu_mlp = Swap("activation", _swiglu_mlp, _no_swiglu_mlp, _GATED_MLP)
patch_embed = Swap("patch_embed", _patch_embed, _no_patch_embed)
rope = Swap("rope", _rope)
vision_rope = Swap("rope", _vision_rope)
packed_attention = Swap("attention", _packed_attention)

# What every family may hold.
OF_TORCH = {
    torch.nn.LayerNorm: layer_norm,
    torch.nn.GELU: torch_gelu,
    torch.nn.Conv2d: patch_embed,
    torch.nn.Conv3d: patch_embed,
}
OF_ACTIVATIONS = {
    "QuickGELUActivation": quick_gelu,
    "GELUActivation": gelu,
    "GELUTanh": gelu_tanh,
}
