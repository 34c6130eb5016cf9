"""rms_norm, layer_norm: the six tests of a room."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.conftest import Backend
from vlmkernels import nn, ops
from vlmkernels.testing import assert_as_accurate, reference_ops

# Which of x, weight, bias, residual an op takes.
USED = {
    "rms_norm": (0, 1),
    "add_rms_norm": (0, 1, 3),
    "layer_norm": (0, 1, 2),
    "add_layer_norm": (0, 1, 2, 3),
}
NORMS = list(USED)
# (64,): one row. 100: no multiple of 8. 8192: the widest that CUDA keeps in registers.
SHAPES = [
    (64,),
    (5, 8),
    (33, 72),
    (2, 3, 100),
    (7, 768),
    (3, 1280),
    (3, 1536),
    (2, 3584),
    (2, 8192),
]


def function(name: str) -> Callable[..., Sequence[Tensor]]:
    """(x, weight, bias, residual) -> (y,) or (y, h)."""

    def run(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Sequence[Tensor]:
        kwargs: dict[str, Any] = {"residual": residual} if name.startswith("add") else {}
        if name.endswith("rms_norm"):
            y = ops.rms_norm(x, weight, **kwargs)
        else:
            y = ops.layer_norm(x, weight, bias, **kwargs)
        return y if kwargs else (y,)

    return run


def inputs(
    shape: tuple[int, ...], backend: Backend, dtype: torch.dtype, weight_dtype: torch.dtype
) -> list[Tensor]:
    """x, weight, bias, residual. x and residual are every second row of tensors full of NaN."""
    rows = []
    for _ in range(2):
        wide = torch.full((*shape[:-1], 2, shape[-1]), torch.nan, device=backend.device)
        wide[..., 0, :] = torch.randn(shape, device=backend.device) + 1
        rows.append(wide.to(dtype)[..., 0, :])
    weight, bias = torch.randn(2, shape[-1], device=backend.device).to(weight_dtype).unbind()
    return [rows[0], weight, bias.clone(), rows[1]]


def check(name: str, values: list[Tensor]) -> None:
    """Outputs and gradients against float64, with PyTorch in the same dtypes as the yardstick."""
    run = function(name)

    def results(values: list[Tensor]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in values]
        outputs = run(*leaves)
        grads = [
            torch.linspace(-1, 2, y.numel(), device=y.device).view_as(y).to(y.dtype)
            for y in outputs
        ]
        found = torch.autograd.grad(outputs, leaves, grads, allow_unused=True)
        return [*outputs, *[x for x in found if x is not None]]

    got = results(values)
    with reference_ops():
        same = results(values)
        if name.startswith("add"):  # the exact result starts from the rounded h
            assert torch.equal(got[1], same[1])
            values = [same[1], *values[1:3], torch.zeros_like(same[1])]
        exact = results([x.double() for x in values])
    assert all(x.is_contiguous() for x in got)
    for i, (a, b, c) in enumerate(zip(got, same, exact, strict=True)):
        assert_as_accurate(f"{name} result {i}", a, b, c)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_accuracy(backend: Backend, name: str, shape: tuple[int, ...]) -> None:
    for dtype in (*backend.dtypes, torch.float32):
        for weight_dtype in {dtype, torch.float32}:
            check(name, inputs(shape, backend, dtype, weight_dtype))


@pytest.mark.parametrize("name", NORMS)
def test_many_rows(backend: Backend, name: str) -> None:
    """Several CTAs and several rows per CTA: the two stages of the weight gradients."""
    for width in (16, 136, 520):
        check(name, inputs((300, width), backend, torch.bfloat16, torch.float32))


def test_exact(backend: Backend) -> None:
    """Rows of +-1 have rms 1; LayerNorm turns 3, 7, 3, 7 into -1, 1, -1, 1, constants into 0."""
    for dtype in (*backend.dtypes, torch.float32):
        signs = torch.randint(0, 2, (6, 96), device=backend.device).to(dtype) * 2 - 1
        weight = torch.randn(96, device=backend.device).to(dtype)
        assert torch.equal(ops.rms_norm(signs, weight, eps=0.0), signs * weight)
        assert torch.equal(ops.rms_norm(signs, weight, eps=3.0), signs * weight / 2)
        x = torch.tensor([3.0, 7.0] * 48, device=backend.device).to(dtype).expand(2, 96)
        y = ops.layer_norm(x, torch.ones_like(weight), eps=0.0)
        assert torch.equal(
            y, torch.tensor([-1.0, 1.0] * 48, device=y.device).to(dtype).expand(2, 96)
        )
        y = ops.layer_norm(torch.full_like(signs, 5.0), weight, weight * 2)
        assert torch.equal(y, (weight * 2).expand(6, 96))
        y, h = ops.rms_norm(signs[:0], weight, residual=signs[:0])
        assert y.shape == h.shape == (0, 96)


def test_gradient(backend: Backend) -> None:
    for name in NORMS:
        values = [torch.randn(s, dtype=torch.float64) for s in ((2, 3, 6), 6, 6, (2, 3, 6))]

        def run(*used: Tensor, name: str = name, values: list[Tensor] = values) -> Sequence[Tensor]:
            given = dict(zip(USED[name], used, strict=True))
            return function(name)(*[given.get(i, x) for i, x in enumerate(values)])

        assert torch.autograd.gradcheck(run, [values[i].requires_grad_() for i in USED[name]])
    # An unused y, an unused h, a frozen weight, no rows.
    x, weight, _, residual = inputs((4, 24), backend, torch.float32, torch.float32)
    x, residual = x.clone().requires_grad_(), residual.clone().requires_grad_()
    y, h = ops.rms_norm(x, weight, residual=residual)
    (dx,) = torch.autograd.grad(h.sum(), x, retain_graph=True)
    assert torch.equal(dx, torch.ones_like(dx))
    dx, dresidual = torch.autograd.grad(y.sum(), (x, residual))
    assert torch.equal(dx, dresidual) and dx.abs().sum() > 0
    weight, empty = weight.clone().requires_grad_(), x.detach()[:0].requires_grad_()
    dempty, dweight = torch.autograd.grad(ops.layer_norm(empty, weight).sum(), (empty, weight))
    assert dempty.shape == (0, 24) and torch.equal(dweight, torch.zeros_like(weight))


def test_deterministic(backend: Backend) -> None:
    x, weight, bias, _ = inputs((200, 256), backend, torch.bfloat16, torch.bfloat16)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    runs = [torch.autograd.grad(ops.layer_norm(*leaves).square().sum(), leaves) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_replaces(backend: Backend) -> None:
    """State_dict and results are those of the replaced modules of torch and transformers."""
    llama = pytest.importorskip("transformers.models.qwen2.modeling_qwen2")
    x = torch.randn(3, 5, 48, device=backend.device)
    for ours, theirs in (
        (nn.RMSNorm(48, eps=1e-6), torch.nn.RMSNorm(48, eps=1e-6)),
        (nn.RMSNorm(48, eps=1e-6), llama.Qwen2RMSNorm(48, eps=1e-6)),
        (nn.LayerNorm(48), torch.nn.LayerNorm(48)),
        (nn.LayerNorm(48, eps=1e-6, bias=False), torch.nn.LayerNorm(48, eps=1e-6, bias=False)),
    ):
        ours, theirs = ours.to(backend.device), theirs.to(backend.device)
        for parameter in theirs.parameters():
            torch.nn.init.normal_(parameter)
        ours.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(ours(x), theirs(x))
        y, h = ours(x, residual=x)
        assert torch.equal(h, x + x)
        torch.testing.assert_close(y, theirs(x + x))


@pytest.mark.parametrize("name", NORMS)
def test_compile(backend: Backend, name: str) -> None:
    values = [
        x.clone().requires_grad_()
        for x in inputs((2, 3, 16), backend, torch.float32, torch.float32)
    ]

    def run(*values: Tensor) -> Tensor:
        outputs = function(name)(values[0] * 2, *values[1:])
        return sum((y.square() * 3).sum() for y in outputs)  # type: ignore[return-value]

    got, expected = torch.compile(run, fullgraph=True, backend="aot_eager")(*values), run(*values)
    torch.testing.assert_close(got, expected)
    used = [values[i] for i in USED[name]]
    grads = [torch.autograd.grad(loss, used) for loss in (got, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_opcheck(backend: Backend) -> None:
    values = [
        x.clone().requires_grad_() for x in inputs((3, 16), backend, torch.float32, torch.float32)
    ]
    x, weight, bias, residual = values
    norm, backward = torch.ops.vlmkernels.norm.default, torch.ops.vlmkernels.norm_backward.default
    torch.library.opcheck(norm, (x, None, weight, None, 1e-6, False))
    torch.library.opcheck(norm, (x, residual, weight, bias, 1e-6, True))
    x, weight, residual = x.detach(), weight.detach(), residual.detach()
    for rows in (1, 2):
        stats = torch.rand(rows, 3, device=backend.device)
        torch.library.opcheck(backward, (x, residual, x, weight, stats, True, rows == 2))
    torch.library.opcheck(backward, (x, None, x, weight, stats, False, False))


def test_wide_rows(backend: Backend) -> None:
    """Beyond 8192 CUDA takes the reference; the CPU kernel has no limit."""
    x = torch.randn(2, 9000, device=backend.device)
    weight = torch.randn(9000, device=backend.device)
    torch.testing.assert_close(ops.layer_norm(x, weight), F.layer_norm(x, (9000,), weight))


def test_drifting_rows(backend: Backend) -> None:
    """Rows whose first elements say nothing about their mean, and rows far from 0."""
    values = inputs((2, 8192), backend, torch.float32, torch.float32)
    values[0][:, :64] += 1e4
    for name in ("layer_norm", "rms_norm"):
        check(name, values)
    values[0][1] += 1e4
    check("layer_norm", values)


def test_any_rows(backend: Backend) -> None:
    """Expanded and transposed dimensions, the last one too, of x and residual, both ways."""
    weight = torch.randn(16, device=backend.device)
    base = torch.randn(4, 3, 16, device=backend.device)
    views = [base[:, :1].expand(4, 3, 16), base[:1].expand(4, 3, 16), base.transpose(0, 1)]
    views += [base[:1, :1].expand(4, 3, 16), base.permute(1, 0, 2)[:, ::2], base[:, :, :8]]
    views += [base.transpose(1, 2), base[:, :, ::2]]
    for x in views:
        both = []
        for z in (x, x.contiguous()):
            leaf, w = z.detach().requires_grad_(), weight[: z.shape[-1]].clone().requires_grad_()
            y, h = ops.layer_norm(leaf, w, residual=z)
            loss = (ops.rms_norm(leaf, w) * 2 + y * h).square().sum()
            both.append([y, h, *torch.autograd.grad(loss, (leaf, w))])
        for a, b in zip(*both, strict=True):
            torch.testing.assert_close(a, b)
    module = nn.LayerNorm(16).to(backend.device)
    expected = F.layer_norm(base.transpose(0, 1), (16,))
    torch.testing.assert_close(module(base.transpose(0, 1)), expected)


def test_constructor_of_layer_norm() -> None:
    """Positional arguments mean what they mean to torch."""
    x = torch.randn(3, 8)
    for arguments in (
        (8,),
        (8, 1e-3),
        (8, 1e-3, False),
        (8, 1e-3, True, False),
        (8, 1, False, True),
    ):
        ours, theirs = nn.LayerNorm(*arguments), torch.nn.LayerNorm(*arguments)
        theirs.load_state_dict(ours.state_dict())
        assert list(ours.state_dict()) == list(theirs.state_dict())
        torch.testing.assert_close(ours(x), theirs(x))
    assert nn.LayerNorm(8, 1e-5, True, True, "cpu", torch.float16).weight.dtype == torch.float16


def test_bad_width_of_a_module() -> None:
    assert nn.RMSNorm((8,)).weight.shape == nn.LayerNorm([8]).weight.shape == (8,)
    for width in (0, -1):
        with pytest.raises(ValueError, match=f"RMSNorm: dim must be positive, got {width}"):
            nn.RMSNorm(width)
    for width in ("8", None, 8.0, (2, 4), True):
        with pytest.raises(TypeError, match=r"LayerNorm: normalized_shape must be .*int"):
            nn.LayerNorm(width)


def test_bad_backward(backend: Backend) -> None:
    """Stats of other rows would be read out of bounds."""
    x, weight = torch.randn(4, 16, device=backend.device), torch.ones(16, device=backend.device)
    backward = torch.ops.vlmkernels.norm_backward.default
    for shape in ((1, 1), (3, 4), (4,), (1, 4, 1), (0, 4)):
        with pytest.raises(ValueError, match="norm_backward: stats must have shape"):
            backward(x, None, x, weight, torch.ones(shape, device=x.device), True, False)
    for stats in (torch.ones(1, 4).double(), torch.ones(1, 4).half()):
        with pytest.raises(TypeError, match="norm_backward: stats must be float32"):
            backward(x, None, x, weight, stats.to(x.device), True, False)
    with pytest.raises(ValueError, match="norm_backward: dy must have the shape of h"):
        backward(x[:2], None, x, weight, torch.ones(1, 4, device=x.device), True, False)


def test_bad_input(backend: Backend) -> None:
    x, weight = torch.randn(4, 16, device=backend.device), torch.ones(16, device=backend.device)
    with pytest.raises(
        ValueError, match=r"rms_norm: weight must have shape .* = \(16,\), got \(8,\)"
    ):
        ops.rms_norm(x, weight[:8])
    with pytest.raises(
        ValueError, match=r"layer_norm: bias must have shape .* = \(16,\), got \(8,\)"
    ):
        ops.layer_norm(x, weight, weight[:8])
    with pytest.raises(ValueError, match="rms_norm: residual must have the shape of x"):
        ops.rms_norm(x, weight, residual=x[:2])
    with pytest.raises(ValueError, match=r"layer_norm: x must have shape \(\.\.\., hidden_dim\)"):
        ops.layer_norm(torch.tensor(1.0, device=backend.device), weight)
    with pytest.raises(ValueError, match="rms_norm: eps must not be negative"):
        ops.rms_norm(x, weight, eps=-1.0)
    with pytest.raises(TypeError, match="rms_norm: weight must be bfloat16, float32, got float16"):
        ops.rms_norm(x.bfloat16(), weight.half())
    with pytest.raises(TypeError, match="rms_norm: residual must have the dtype of x"):
        ops.rms_norm(x, weight, residual=x.half())
    with pytest.raises(TypeError, match=r"rms_norm: x must be float64, .* got int64"):
        ops.rms_norm(torch.ones(2, 16, dtype=torch.int64, device=backend.device), weight)
    with pytest.raises(TypeError, match="layer_norm: bias must have the dtype of weight"):
        ops.layer_norm(x.half(), weight, weight.half())
