"""attention at the shapes of real VLMs, against what runs there today: SDPA, image by image."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.case import Case
from vlmkernels import ops


@dataclass(frozen=True)
class Shape:
    """Sequences of these lengths, packed; the CPU takes the first `cpu_lengths` of them."""

    name: str
    lengths: tuple[int, ...]
    cpu_lengths: int
    num_heads: int
    num_heads_k: int
    head_dim: int
    causal: bool = False

    def on(self, device: str) -> tuple[int, ...]:
        return self.lengths if device == "cuda" else self.lengths[: self.cpu_lengths]


SHAPES = (
    Shape("vit_l14_336", (577,) * 32, 1, 16, 16, 64),
    # Images of different size, as the processor's dynamic resolution makes them.
    Shape("qwen2vl_vision", (256, 400, 144, 576, 1024, 2304, 3600, 1480), 4, 16, 16, 80),
    Shape("qwen2_5vl_windows", (64,) * 256, 24, 16, 16, 80),
    Shape("qwen2vl_7b_prefill", (512, 2048, 4096), 1, 28, 4, 128, causal=True),
    Shape("digits", (20, 60, 33, 41, 27, 50, 38, 22) * 8, 16, 4, 4, 32),
)
DECODES = (("qwen2vl_7b_decode", 28, 4, 128), ("vicuna_7b_decode", 32, 32, 128))


def cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    for shape in SHAPES:
        yield from _cases(shape, device, dtype)
    for decode in DECODES:
        yield _decode_case(*decode, device, dtype)


def _cases(shape: Shape, device: str, dtype: torch.dtype) -> Iterator[Case]:
    lengths = shape.on(device)
    tokens, heads, heads_k, dim = sum(lengths), shape.num_heads, shape.num_heads_k, shape.head_dim
    q, dout = (torch.randn(tokens, heads, dim, device=device).to(dtype) for _ in range(2))
    k, v = (torch.randn(tokens, heads_k, dim, device=device).to(dtype) for _ in range(2))
    forward = _variants(lengths, shape.causal, heads != heads_k, q)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    flops = 4 * heads * dim * sum(n * n for n in lengths) // (2 if shape.causal else 1)
    size = (2 * heads + 2 * heads_k) * tokens * dim * dtype.itemsize
    distinct = f"{len(lengths)}x{lengths[0]}" if len({*lengths}) == 1 else f"{len(lengths)} seqs"
    common: dict[str, Any] = {
        "op": "attention",
        "shape": f"{shape.name} {distinct} {heads}/{heads_k}x{dim}",
        "dtype": str(dtype).removeprefix("torch."),
    }
    yield Case(
        **common, direction="fwd", bytes=size, flops=flops,
        variants={name: _forward(run, (q, k, v)) for name, run in forward.items()},
    )  # fmt: skip
    yield Case(
        **common, direction="fwd+bwd", bytes=3 * size, flops=7 * flops // 2,
        variants={name: _both(run, leaves, dout) for name, run in forward.items()},
    )  # fmt: skip


def _forward(run: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.no_grad():
            return run(*inputs)

    return call


def _both(
    run: Callable[..., Tensor], leaves: Sequence[Tensor], dout: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: torch.autograd.grad(run(*leaves), leaves, dout)


def _variants(
    lengths: tuple[int, ...], causal: bool, gqa: bool, like: Tensor
) -> dict[str, Callable[..., Tensor]]:
    cu_seqlens = torch.tensor((0, *lengths), device=like.device).cumsum(0).int()
    longest = max(lengths)

    def vlmkernels(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return ops.attention(q, k, v, causal=causal, cu_seqlens_q=cu_seqlens, max_seqlen_q=longest)

    def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal and mask is None, enable_gqa=gqa
        )
        return out[0].transpose(0, 1)

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As transformers' vision towers do it: split, attend one by one, concatenate."""
        parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
        return torch.cat([sdpa(*part) for part in parts])

    variants: dict[str, Callable[..., Tensor]] = {"vlmkernels": vlmkernels, "eager": eager}
    if len(lengths) > 1 and sum(lengths) <= 16384:
        mask = _block_mask(lengths, causal, like)
        variants["sdpa dense mask"] = lambda q, k, v: sdpa(q, k, v, mask)
    return variants


def _block_mask(lengths: tuple[int, ...], causal: bool, like: Tensor) -> Tensor:
    index = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    mask = index[:, None] == index
    return (mask.tril() if causal else mask).to(like.device)


def _decode_case(
    name: str, num_heads: int, num_heads_k: int, head_dim: int, device: str, dtype: torch.dtype
) -> Case:
    batch, seqlen = (16, 4096) if device == "cuda" else (2, 1024)
    q = torch.randn(batch, 1, num_heads, head_dim, device=device).to(dtype)
    k, v = (
        torch.randn(batch, seqlen, num_heads_k, head_dim, device=device).to(dtype) for _ in range(2)
    )
    cache_seqlens = torch.full((batch,), seqlen, dtype=torch.int32, device=device)

    def eager() -> Tensor:
        qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))
        out = scaled_dot_product_attention(qt, kt, vt, enable_gqa=num_heads != num_heads_k)
        return out.transpose(1, 2)

    return Case(
        op="attention_decode",
        shape=f"{name} {batch}x{seqlen} {num_heads}/{num_heads_k}x{head_dim}",
        dtype=str(dtype).removeprefix("torch."),
        direction="fwd",
        bytes=2 * k.numel() * dtype.itemsize,
        flops=4 * batch * num_heads * seqlen * head_dim,
        variants={
            "vlmkernels": lambda: ops.attention_decode(q, k, v, cache_seqlens),
            "eager": eager,
        },
    )
