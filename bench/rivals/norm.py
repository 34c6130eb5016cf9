"""Rivals of rms_norm and layer_norm: torch.nn.functional, transformers' module, Liger, quack."""

from types import SimpleNamespace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from bench.rivals import NotSupportedError, rival


def _with_residual(y: Any, h: Tensor, residual: Tensor | None) -> Any:
    return y if residual is None else (y, h)


@rival("rms_norm", "F.rms_norm")
def torch_rms_norm(
    x: Tensor, weight: Tensor, *, eps: float = 1e-6, residual: Tensor | None = None
) -> Any:
    h = x if residual is None else x + residual
    return _with_residual(F.rms_norm(h, weight.shape, weight, eps), h, residual)


@rival("rms_norm", "transformers Qwen2RMSNorm", "transformers.models.qwen2")
def transformers_rms_norm(
    x: Tensor, weight: Tensor, *, eps: float = 1e-6, residual: Tensor | None = None
) -> Any:
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    h = x if residual is None else x + residual
    module: Any = SimpleNamespace(weight=weight, variance_epsilon=eps)
    return _with_residual(Qwen2RMSNorm.forward(module, h), h, residual)


@rival("rms_norm", "Liger", "liger_kernel", needs_cuda=True)
def liger_rms_norm(
    x: Tensor, weight: Tensor, *, eps: float = 1e-6, residual: Tensor | None = None
) -> Any:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    options = (eps, 0.0, "llama", False)  # offset, casting mode, not in place
    if residual is None:
        return LigerRMSNormFunction.apply(x, weight, *options)
    return LigerFusedAddRMSNormFunction.apply(x, residual, weight, *options)


@rival("rms_norm", "quack", "quack", needs_cuda=True)
def quack_rms_norm(
    x: Tensor, weight: Tensor, *, eps: float = 1e-6, residual: Tensor | None = None
) -> Any:
    from quack import rmsnorm

    if residual is not None:
        raise NotSupportedError("without residual here")
    return rmsnorm(x, weight, eps=eps)


@rival("layer_norm", "F.layer_norm")
def torch_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Any:
    h = x if residual is None else x + residual
    return _with_residual(F.layer_norm(h, weight.shape, weight, bias, eps), h, residual)


@rival("layer_norm", "Liger", "liger_kernel", needs_cuda=True)
def liger_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Any:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    if bias is None:
        raise NotSupportedError("wants a bias")
    h = x if residual is None else x + residual
    return _with_residual(LigerLayerNormFunction.apply(h, weight, bias, eps), h, residual)
