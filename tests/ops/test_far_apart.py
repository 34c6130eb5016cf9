"""Elements more than 2^31 apart: no offset is computed in 32 bits.

The tensors are views of memory that nothing else touches, so that next to none of it is ever mapped
on a CPU; a GPU must have 4 GiB for it.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import Backend
from vlmkernels import ops

FAR = 2**31 + 64
NUM_HEADS, HEAD_DIM = 2, 16
WIDTH = NUM_HEADS * HEAD_DIM


def two_rows(backend: Backend, width: int) -> Tensor:
    """(2, width) in bf16, FAR elements from row to row."""
    memory = torch.empty(FAR + width, dtype=torch.bfloat16, device=backend.device)
    rows = memory.as_strided((2, width), (FAR, 1))
    return rows.copy_(torch.randn(2, width))


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (NUM_HEADS, HEAD_DIM))


def rope(x: Tensor) -> Any:
    positions = torch.tensor([3, 5], device=x.device)
    return ops.rope(heads(x), heads(x), positions)


def rope_from_tables(x: Tensor) -> Any:
    return ops.rope_from_tables(heads(x), heads(x), x[:, :HEAD_DIM], x[:, HEAD_DIM:])


def qk_norm_rope(x: Tensor) -> Any:
    weight = torch.ones(HEAD_DIM, dtype=x.dtype, device=x.device)
    positions = torch.tensor([3, 5], device=x.device)
    return ops.qk_norm_rope(heads(x), heads(x), weight, weight, positions)


def vision_rope_qkv(x: Tensor) -> Any:
    positions = torch.tensor([[3, 5], [1, 2]], device=x.device)
    return ops.vision_rope_qkv(x.unflatten(-1, (3, NUM_HEADS, HEAD_DIM)), positions)


def patch_embed(x: Tensor) -> Any:
    return ops.patch_embed(x, torch.ones(8, WIDTH, dtype=x.dtype, device=x.device))


def images(x: Tensor) -> Any:
    """An image of two patches in each row."""
    weight = torch.ones(8, 1, 4, 4, dtype=x.dtype, device=x.device)
    return ops.patch_embed(x.unflatten(-1, (1, 4, 8)), weight)


CALLS: dict[str, Callable[[Tensor], Any]] = {
    "rms_norm": lambda x: ops.rms_norm(x, torch.ones_like(x[0])),
    "layer_norm": lambda x: ops.layer_norm(x, torch.ones_like(x[0]), torch.ones_like(x[0])),
    "rms_norm residual": lambda x: ops.rms_norm(x, torch.ones_like(x[0]), residual=x),
    "gelu": ops.gelu,
    "swiglu": lambda x: ops.swiglu(x, x),
    "swiglu fused": ops.swiglu,
    "rope": rope,
    "rope_from_tables": rope_from_tables,
    "qk_norm_rope": qk_norm_rope,
    "vision_rope_qkv": vision_rope_qkv,
    "patch_embed rows": patch_embed,
    "patch_embed": images,
}


@pytest.mark.parametrize("name", CALLS)
def test_rows_far_apart(backend: Backend, name: str) -> None:
    """The results are those of rows that lie together; gradients too."""
    x = two_rows(backend, 3 * WIDTH if name == "vision_rope_qkv" else WIDTH)
    results = []
    for leaf in (x.detach(), x.clone(memory_format=torch.contiguous_format)):
        leaf.requires_grad_()
        out = CALLS[name](leaf)
        outputs = [y for y in (out if isinstance(out, tuple) else (out,)) if y.requires_grad]
        total = sum(((y.float() + 1) ** 2).sum() for y in outputs)
        results.append((*outputs, torch.autograd.grad(total, leaf)[0]))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_too_many_heads(backend: Backend) -> None:
    few = torch.ones(2, dtype=torch.bfloat16, device=backend.device)
    q, k = few.as_strided((1, 2**24, 2), (0, 0, 1)), few.view(1, 1, 2)
    position = torch.zeros(1, dtype=torch.int64, device=backend.device)
    for heads in ((q, k), (k, q)):
        with pytest.raises(ValueError, match=r"must have num_heads and head_dim below 2\^24"):
            ops.rope(*heads, position)


def test_too_large_an_image(backend: Backend) -> None:
    pixels = torch.zeros(48, dtype=torch.uint8, device=backend.device)
    weight = torch.ones(8, 3, 4, 4, dtype=torch.bfloat16, device=backend.device)
    grid = torch.tensor([[1, 2**14, 2**14]])
    with pytest.raises(ValueError, match=r"images of fewer than 2\^31 pixels and channels, got"):
        ops.patch_embed_pixels(pixels, weight, grid_thw=grid, mean=[0.5] * 3, std=[0.5] * 3)
