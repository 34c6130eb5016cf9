"""What only a GPU shows: which kernels run, on which stream, in graphs, and always alike.

Inputs become outputs and gradients; no kernel has atomics on sums, so these are the same bits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from vlmkernels import ops


@dataclass(frozen=True)
class Case:
    """An op of bf16 tensors of some shapes, and the kernels that must run on sm_90."""

    op: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    kernels: tuple[str, ...]

    def inputs(self, seed: int) -> list[Tensor]:
        generator = torch.Generator("cuda").manual_seed(seed)
        tensors = (torch.randn(s, generator=generator, device="cuda") for s in self.shapes)
        return [x.bfloat16().requires_grad_() for x in tensors]

    def run(self, inputs: list[Tensor]) -> list[Tensor]:
        out = self.op(*inputs)
        weights = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
        grads = torch.autograd.grad((out * weights).sum(), inputs, allow_unused=True)
        return [out.detach(), *(x for x in grads if x is not None)]


def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Five sequences, one of them empty."""
    ends = torch.arange(6, dtype=torch.int32, device=q.device) * (len(q) // 4)
    ends = ends.sub_(len(q) // 4).clamp_(min=0)
    sizes = {"max_seqlen_q": len(q), "max_seqlen_k": len(k)}
    return ops.attention(q, k, v, cu_seqlens_q=ends, cu_seqlens_k=ends, **sizes)


def windowed(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return ops.attention(q, k, v, bias=bias, window_size=(100, 100))


def distance(z: Tensor, codebook: Tensor) -> Tensor:
    return ops.vq_lookup(z, codebook.detach()).distance


def pixels(x: Tensor, weight: Tensor) -> Tensor:
    statistics = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    return ops.patch_embed_pixels(x, weight, merge_size=2, **statistics)


def of_bytes(x: Tensor, weight: Tensor) -> Tensor:
    return pixels((x.detach() * 40 + 120).clamp(0, 255).to(torch.uint8), weight)


FORWARD, BACKWARD = "attention_fwd_sm90_kernel", "attention_bwd_sm90_kernel"
MASKED, WIDE = "attention_fwd_masked_sm90_kernel", "attention_bwd_wide_sm90_kernel"
CLIP = tuple(f"contrastive_{name}_hopper_kernel" for name in ("forward", "ds", "products"))
EMBED = tuple(f"patch_embed{name}" for name in ("", "_dx", "_dweight"))
IMAGES = ((8, 3, 224, 224), (384, 3, 14, 14))
CASES = {
    "attention": Case(ops.attention, ((3, 700, 4, 72),) * 3, (FORWARD, BACKWARD)),
    "attention short": Case(ops.attention, ((3, 60, 4, 64),) * 3, (FORWARD, BACKWARD)),
    "attention causal": Case(
        partial(ops.attention, causal=True),
        ((2, 1024, 4, 128), (2, 1024, 2, 128), (2, 1024, 2, 128)),
        (FORWARD, BACKWARD),
    ),
    "attention packed": Case(packed, ((1000, 4, 80),) * 3, (FORWARD, BACKWARD)),
    "attention masked": Case(
        windowed,
        (*((2, 500, 4, 96),) * 3, (1, 4, 500, 500)),
        (MASKED, BACKWARD, "attention_dbias_sm90_kernel"),
    ),
    "attention wide": Case(ops.attention, ((2, 500, 4, 256),) * 3, (MASKED, BACKWARD, WIDE)),
    "patch_embed": Case(ops.patch_embed, IMAGES, tuple(f"{name}_kernel" for name in EMBED)),
    "pixels": Case(pixels, IMAGES, tuple(f"{name}_hopper_kernel" for name in EMBED)),
    "pixels, bytes": Case(
        of_bytes, IMAGES, ("patch_embed_resident_kernel", "patch_embed_dweight_hopper_kernel")
    ),
    "clip_loss": Case(ops.clip_loss, ((1500, 256), (1500, 256), ()), CLIP),
    "siglip_loss": Case(ops.siglip_loss, ((1500, 256), (1500, 256), (), ()), CLIP),
    "qformer_attention": Case(
        partial(ops.qformer_attention, form="absorbed"),
        ((4, 32, 12, 64), (4, 257, 1408), (768, 1408), (768, 1408)),
        ("qformer_attention_fwd_hopper_kernel", "qformer_attention_bwd_hopper_kernel"),
    ),
    "vq_lookup": Case(distance, ((3000, 64), (4096, 64)), ("vq_lookup_hopper_kernel",)),
}
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.parametrize("case", CASES.values(), ids=CASES),
]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for x, y in zip(found, expected, strict=True):
        assert torch.isfinite(y).all() and torch.equal(x, y)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="no Hopper GPU",
)
def test_hopper_kernels(case: Case) -> None:
    inputs = case.inputs(0)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        case.run(inputs)
        torch.cuda.synchronize()
    names = {event.key for event in profiler.key_averages()}
    missing = [kernel for kernel in case.kernels if not any(kernel in name for name in names)]
    assert missing == [], sorted(names)


def test_side_stream(case: Case) -> None:
    """Inputs come late on a stream that is not the default one."""
    inputs = case.inputs(0)
    expected = case.run(inputs)
    late = [torch.full_like(x, torch.nan).requires_grad_() for x in inputs]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        with torch.no_grad():
            for x, y in zip(late, inputs, strict=True):
                x.copy_(y)
        found = case.run(late)
    torch.cuda.synchronize()
    assert_same(found, expected)


def test_graph(case: Case) -> None:
    """Replays with other inputs: nothing is left over from the run before."""
    static = case.inputs(0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        case.run(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = case.run(static)
    for seed in (1, 2, 2):
        inputs = case.inputs(seed)
        with torch.no_grad():
            for x, y in zip(static, inputs, strict=True):
                x.copy_(y)
        graph.replay()
        assert_same(found, case.run(inputs))


def test_busy(case: Case) -> None:
    """A race shows as other bits now and then, sooner while something else has some of the SMs."""
    inputs = case.inputs(0)
    expected = case.run(inputs)
    noise, other = torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(50):
        with torch.cuda.stream(other):
            noise @ noise
        assert_same(case.run(inputs), expected)
    torch.cuda.synchronize()
