"""patch_embed against Conv2d and Conv3d: exact, accurate, gradients, compile, memory, bad input."""

import itertools
import math

import pytest
import torch
import torch.nn.functional
from torch import Tensor

from tests.conftest import Backend, need_emulated_core
from tests.ops.attention_cases import run_emulated
from vlmkernels import _core, ops
from vlmkernels.ops.patch_embed import reference
from vlmkernels.testing import assert_as_accurate

# x, weight. Bytes that lie together in a line of a patch: 2 (odd sizes), 4 (14 pixels), 8, 16.
CASES = {
    "rows K=27": ((70, 27), (8, 27)),
    "rows K=588": ((33, 588), (72, 3, 14, 14)),
    "rows K=1176": ((40, 1176), (72, 3, 2, 14, 14)),
    "one row": ((1, 768), (136, 768)),
    "ViT 16x16": ((2, 3, 32, 48), (72, 3, 16, 16)),
    "CLIP 14x14, border": ((2, 3, 33, 48), (72, 3, 14, 14)),
    "4x12": ((2, 5, 8, 36), (24, 5, 4, 12)),
    "3x5, border": ((3, 2, 10, 21), (20, 2, 3, 5)),
    "video 2x14x14": ((2, 3, 4, 28, 28), (72, 3, 2, 14, 14)),
    "video 3x4x8, border": ((1, 2, 7, 9, 20), (9, 2, 3, 4, 8)),
    "one patch": ((1, 1, 3, 3), (5, 1, 3, 3)),
}
LARGE_CASES = {  # large tiles forward; large tiles for dx and dweight; dweight in splits
    "1296 patches to 1272": ((1, 3, 144, 144), (1272, 3, 4, 4)),
    "1130 rows to K=1176": ((1130, 1176), (32, 1176)),
    "dim 1272 from K=1176": ((2, 6, 14, 28), (1272, 6, 14, 14)),
    "1100 rows": ((1100, 27), (8, 27)),
    "2640 rows to 1280": ((2640, 72), (1280, 72)),  # the largest tiles of Hopper
    "2640 patches to 1280": ((1, 1, 192, 880), (1280, 1, 8, 8)),
}


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, pos_embed: Tensor | None) -> Tensor:
    """What patch_embed replaces, by torch's own convolution."""
    if x.ndim == 2:
        y = x @ weight.flatten(1).t() + (0 if bias is None else bias)
    else:
        conv = torch.nn.functional.conv2d if x.ndim == 4 else torch.nn.functional.conv3d
        y = conv(x, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    return y if pos_embed is None else y + pos_embed


def num_patches(x: tuple[int, ...], weight: tuple[int, ...]) -> int:
    if len(x) == 2:
        return x[0]
    return math.prod(size // patch for size, patch in zip(x[2:], weight[2:], strict=True))


def inputs(case: tuple[tuple[int, ...], ...], integers: bool = False) -> list[Tensor]:
    """x, weight, bias, pos_embed, dy in float64; integers: every sum of them is exact in bf16."""
    x, weight = case
    patches, dim = num_patches(x, weight), weight[0]
    shapes = (x, weight, (dim,), (patches, dim), (*x[:1], *([patches] * (len(x) > 2)), dim))
    if integers:
        return [torch.randint(-1, 2, shape).double() for shape in shapes]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def gradients(function, tensors: list[Tensor], dy: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    return torch.autograd.grad(function(*leaves), leaves, dy)


@pytest.mark.parametrize("case", [*CASES.items(), *LARGE_CASES.items()], ids=lambda c: c[0])
def test_exact(backend: Backend, case: tuple[str, tuple[tuple[int, ...], ...]]) -> None:
    """Sums of small integers have no rounding: every bit must be right."""
    *tensors, dy = inputs(case[1], integers=True)
    exact = [convolution(*tensors), *gradients(convolution, tensors, dy)]
    assert max(float(t.abs().max()) for t in exact) <= 256
    for dtype in backend.dtypes[:1] if case[0] in LARGE_CASES else backend.dtypes:
        ours = [t.to(backend.device, dtype) for t in tensors]
        got = [
            ops.patch_embed(*ours),
            *gradients(ops.patch_embed, ours, dy.to(backend.device, dtype)),
        ]
        for name, value, want in zip(
            ("y", "dx", "dweight", "dbias", "dpos"), got, exact, strict=True
        ):
            assert value.dtype == dtype
            assert torch.equal(value.cpu().double(), want), name


@pytest.mark.parametrize("case", [*CASES.items()], ids=lambda c: c[0])
def test_exact_before_hopper(
    hopper: Backend, case: tuple[str, tuple[tuple[int, ...], ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels of sm_80, which Hopper takes where TMA cannot take an operand."""
    monkeypatch.setenv("VLMKERNELS_ARCH", "80")
    test_exact(hopper, case)


PROGRAM = """
import torch
from vlmkernels import ops
for x, weight in (((70, 64), (72, 64)), ((1, 3, 32, 32), (72, 3, 16, 16))):
    leaves = [torch.randn(shape).half().requires_grad_() for shape in (x, weight)]
    ops.patch_embed(*leaves).sum().backward()
"""


def test_kernels() -> None:
    """Rows and images in 16 bits run on wgmma where there is Hopper; dweight not yet."""
    need_emulated_core()
    kernels = run_emulated(PROGRAM, PTXEMU_STATS="1").stderr
    for name in ("patch_embed_rows_hopper", "patch_embed_hopper", "patch_embed_dx_hopper"):
        assert f"{name}_kernel" in kernels
    assert "patch_embed_kernel" not in kernels and "patch_embed_dx_kernel" not in kernels
    kernels = run_emulated(PROGRAM, PTXEMU_STATS="1", VLMKERNELS_ARCH="80").stderr
    assert "hopper" not in kernels and "patch_embed_kernel" in kernels


@pytest.mark.parametrize("case", ["rows K=588", "CLIP 14x14, border", "video 2x14x14"])
def test_accurate(backend: Backend, case: str) -> None:
    for dtype in backend.dtypes:
        *tensors, dy = (t.to(backend.device, dtype) for t in inputs(CASES[case]))
        exact = [t.double() for t in tensors]
        assert_as_accurate("y", ops.patch_embed(*tensors), reference(*tensors), convolution(*exact))
        for name, got, same_dtype, want in zip(
            ("dx", "dweight", "dbias", "dpos"),
            gradients(ops.patch_embed, tensors, dy),
            gradients(reference, tensors, dy),
            gradients(convolution, exact, dy.double()),
            strict=True,
        ):
            assert_as_accurate(name, got, same_dtype, want)


@pytest.mark.parametrize(
    "case", [((3, 6), (4, 6)), ((2, 2, 5, 7), (3, 2, 2, 3)), ((1, 2, 5, 4, 3), (3, 2, 2, 2, 3))]
)
def test_gradient(backend: Backend, case: tuple[tuple[int, ...], ...]) -> None:
    """By finite differences, all together; then each subset of the gradients alone."""
    *tensors, dy = (t.to(backend.device) for t in inputs(case))
    for t in tensors:
        t.requires_grad_()
    assert torch.autograd.gradcheck(ops.patch_embed, tensors)
    assert torch.autograd.gradcheck(ops.patch_embed, tensors[:2])
    dtype = backend.dtypes[0]
    whole = gradients(ops.patch_embed, [t.to(dtype) for t in tensors], dy.to(dtype))
    for wanted in itertools.product([False, True], repeat=4):
        if any(wanted):
            leaves = [
                t.detach().to(dtype).requires_grad_(want)
                for t, want in zip(tensors, wanted, strict=True)
            ]
            ops.patch_embed(*leaves).backward(dy.to(dtype))
            for leaf, want, gradient in zip(leaves, wanted, whole, strict=True):
                assert torch.equal(leaf.grad, gradient) if want else leaf.grad is None


@pytest.mark.parametrize("case", ["rows K=27", "3x5, border", "video 3x4x8, border"])
def test_compile(backend: Backend, case: str) -> None:
    dtype = backend.dtypes[0]
    *tensors, dy = (t.to(backend.device, dtype) for t in inputs(CASES[case], integers=True))
    compiled = torch.compile(
        lambda *t: ops.patch_embed(*t) * 2, fullgraph=True, backend="aot_eager"
    )
    for got, want in zip(
        gradients(compiled, tensors, dy),
        gradients(ops.patch_embed, tensors, dy * 2),
        strict=True,
    ):
        assert torch.equal(got, want)


def test_opcheck(backend: Backend) -> None:
    dtype = backend.dtypes[0]
    for case in ("rows K=27", "3x5, border"):
        *tensors, dy = (t.to(backend.device, dtype) for t in inputs(CASES[case], integers=True))
        x, weight = tensors[0].clone(), tensors[1].clone()
        leaves = [t.requires_grad_() for t in tensors]
        op = torch.ops.vlmkernels
        torch.library.opcheck(op.patch_embed.default, tuple(leaves))
        torch.library.opcheck(op.patch_embed.default, (leaves[0], leaves[1], None, None))
        torch.library.opcheck(op.patch_embed_dx.default, (dy, weight, list(x.shape)))
        torch.library.opcheck(op.patch_embed_dweight.default, (dy, x, weight, True))


@pytest.mark.parametrize("case", CASES)
def test_memory(backend: Backend, case: str) -> None:
    """x at an odd place among NaN, the border that fills no patch NaN too: neither is read."""
    dtype = backend.dtypes[0]
    x, weight, bias, pos_embed, dy = (
        t.to(backend.device, dtype) for t in inputs(CASES[case], integers=True)
    )
    around = x.new_full([size + 3 for size in x.shape], torch.nan)
    inside = around[tuple(slice(1, 1 + size) for size in x.shape)]
    kept = inside
    if x.ndim > 2:
        patch = weight.shape[2:]
        kept = inside[
            (..., *(slice(0, n // p * p) for n, p in zip(x.shape[2:], patch, strict=True)))
        ]
    kept.copy_(x[tuple(slice(0, size) for size in kept.shape)])
    assert not inside.is_contiguous() or x.shape[0] == 1
    assert torch.equal(
        ops.patch_embed(inside, weight, bias, pos_embed),
        ops.patch_embed(x, weight, bias, pos_embed),
    )
    got = gradients(lambda w: ops.patch_embed(inside, w), [weight], dy)
    assert torch.equal(got[0], gradients(lambda w: ops.patch_embed(x, w), [weight], dy)[0])


def test_layouts(backend: Backend) -> None:
    """channels_last, an expanded channel, a weight that is a column slice: as torch takes them."""
    dtype = backend.dtypes[0]
    for layout in ("channels_last", "expanded", "transposed"):
        x, weight, bias, _, dy = (
            t.to(backend.device, dtype) for t in inputs(CASES["4x12"], integers=True)
        )
        want = convolution(x.double(), weight.double(), bias.double(), None)
        if layout == "channels_last":
            x = x.to(memory_format=torch.channels_last)
            weight = weight.to(memory_format=torch.channels_last)
        elif layout == "expanded":
            x = x[:, :1].expand(x.shape)
            want = convolution(x.double(), weight.double(), bias.double(), None)
        else:
            x = x.transpose(2, 3).contiguous().transpose(2, 3)
        assert torch.equal(ops.patch_embed(x, weight, bias).double(), want)
        got = gradients(ops.patch_embed, [x, weight, bias], dy)
        exact = gradients(
            lambda *t: convolution(*t, None), [t.double() for t in (x, weight, bias)], dy.double()
        )
        for value, gradient in zip(got, exact, strict=True):
            assert torch.equal(value.double(), gradient)


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        ((0, 12), (5, 12)),
        ((0, 3, 4, 4), (5, 3, 2, 2)),
        ((0, 3, 1, 1), (4, 3, 2, 2)),  # no images, and smaller than a patch
        ((0, 3, 2, 1, 5), (4, 3, 2, 2, 2)),
    ],
)
def test_no_patches(backend: Backend, x: tuple[int, ...], weight: tuple[int, ...]) -> None:
    dtype = backend.dtypes[0]
    *tensors, dy = (t.to(backend.device, dtype) for t in inputs((x, weight)))
    assert ops.patch_embed(*tensors).shape == dy.shape
    dx, dweight, dbias, dpos = gradients(ops.patch_embed, tensors, dy)
    assert dx.shape == x
    assert not dweight.any() and not dbias.any() and not dpos.any()


def test_splits_without_bias(backend: Backend) -> None:
    """The workspace then has no column for dbias: reading one would be out of bounds."""
    x, weight, _, _, dy = (
        t.to(backend.device, backend.dtypes[0])
        for t in inputs(LARGE_CASES["1100 rows"], integers=True)
    )
    assert _core.C.patch_embed_splits(1100, *weight.shape) > 1
    (dweight,) = gradients(lambda w: ops.patch_embed(x, w), [weight], dy)
    assert torch.equal(dweight.double(), dy.double().t() @ x.double())


def test_deterministic(backend: Backend) -> None:
    dtype = backend.dtypes[0]
    *tensors, dy = (t.to(backend.device, dtype) for t in inputs(LARGE_CASES["1100 rows"]))
    first = gradients(ops.patch_embed, tensors, dy)
    for _ in range(3):
        for a, b in zip(first, gradients(ops.patch_embed, tensors, dy), strict=True):
            assert torch.equal(a, b)


def test_autocast(backend: Backend) -> None:
    """fp32 parameters and images under autocast, as Conv2d takes them."""
    tensors = [
        t.to(backend.device, torch.float32) for t in inputs(CASES["4x12"], integers=True)[:3]
    ]
    leaves = [t.requires_grad_() for t in tensors]
    with torch.autocast(backend.device, torch.bfloat16):
        y = ops.patch_embed(*leaves)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y.float(), convolution(*tensors, None))
    y.sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)


def test_bad_input(backend: Backend) -> None:
    dtype = backend.dtypes[0]
    x, weight = torch.randn(2, 3, 8, 8).to(dtype), torch.randn(4, 3, 4, 4).to(dtype)
    bias, pos_embed = torch.randn(4).to(dtype), torch.randn(4, 4).to(dtype)
    x, weight, bias, pos_embed = (t.to(backend.device) for t in (x, weight, bias, pos_embed))
    wrong_values = {
        r"x must have patch_dim = 48 columns like weight, got \(8, 8\)": (x[0, 0], weight),
        r"x must have shape \(num_patches, patch_dim\), .*, got \(3, 8, 8\)": (x[0], weight),
        r"x must have patch_dim = 48 columns like weight, got \(5, 47\)": (
            x.new_zeros(5, 47),
            weight,
        ),
        r"weight must have shape \(hidden_dim, patch_dim\), .*, got \(4,\)": (
            x,
            weight[:, 0, 0, 0],
        ),
        r"weight must have as many dimensions as x \(2, 3, 8, 8\), got": (x, weight[:, :, None]),
        r"weight must not be empty, got \(0, 3, 4, 4\)": (x, weight[:0]),
        r"weight must not be empty, got \(4, 3, 0, 4\)": (x, weight[:, :, :0]),
        r"x must have channels = 3 like weight, got \(2, 2, 8, 8\)": (x[:, :2], weight),
        r"x must hold at least one patch \(4, 4\), got \(2, 3, 3, 8\)": (x[:, :, :3], weight),
        r"bias must have shape \(hidden_dim,\) = \(4,\), got \(3,\)": (x, weight, bias[:3]),
        r"pos_embed must have shape \(num_patches, hidden_dim\) = \(4, 4\), got \(3, 4\)": (
            x,
            weight,
            bias,
            pos_embed[:3],
        ),
        r"pos_embed must be contiguous": (x, weight, bias, pos_embed.t()),
    }
    for message, arguments in wrong_values.items():
        with pytest.raises(ValueError, match="patch_embed: " + f"({message})"):
            ops.patch_embed(*arguments)
    wrong_types = {
        "x must be float64, float32, float16, bfloat16, got int64": (x.long(), weight),
        r"weight must have the dtype of x \(.*\), got float64": (x, weight.double()),
        r"bias must have the dtype of x \(.*\), got float64": (x, weight, bias.double()),
        "x must be a plain torch.Tensor": (x.as_subclass(Subclass), weight),
    }
    for message, arguments in wrong_types.items():
        with pytest.raises(TypeError, match="patch_embed: " + message):
            ops.patch_embed(*arguments)


class Subclass(torch.Tensor):
    pass
