"""quick_gelu, gelu, swiglu, geglu: the six tests of a room."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.conftest import Backend
from vlmkernels import nn, ops
from vlmkernels.testing import assert_as_accurate, reference_ops

PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": ops.quick_gelu,
    "gelu": ops.gelu,
    "gelu_tanh": lambda x: ops.gelu(x, approximate="tanh"),
}
GATED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "swiglu": ops.swiglu,
    "geglu": ops.geglu,
    "geglu_erf": lambda gate, up: ops.geglu(gate, up, approximate="none"),
    "swiglu fused": lambda gate, up: ops.swiglu(torch.cat([gate, up], dim=-1)),
    "geglu fused": lambda gate, up: ops.geglu(torch.cat([gate, up], dim=-1)),
}
# Fewer than a vector; odd sizes; rows of several vectors; a row longer than a block of columns.
SHAPES = [(4,), (7,), (3, 5, 8), (33, 72), (2, 3, 100), (5, 520), (2, 2056)]


def values(shape: tuple[int, ...], backend: Backend, dtype: torch.dtype) -> Tensor:
    """Wide enough for both tails of every activation."""
    return (torch.randn(shape, device=backend.device) * 3).to(dtype)


def results(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = function(*leaves)
    dy = torch.linspace(-1, 2, y.numel(), device=y.device).view_as(y).to(y.dtype)
    return [y, *torch.autograd.grad(y, leaves, dy)]


def check(name: str, inputs: list[Tensor]) -> None:
    """Output and gradients against float64, with PyTorch in the same dtype as the yardstick."""
    function = {**PLAIN, **GATED}[name]
    got = results(function, inputs)
    with reference_ops():
        same = results(function, inputs)
        exact = results(function, [x.double() for x in inputs])
    for part, *three in zip(("y", "dx", "dup"), got, same, exact, strict=False):
        assert_as_accurate(f"{name} {part} {inputs[0].dtype}", *three)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", [*PLAIN, *GATED])
def test_accuracy(backend: Backend, name: str, shape: tuple[int, ...]) -> None:
    for dtype in (*backend.dtypes, torch.float32):
        check(name, [values(shape, backend, dtype) for _ in range(2 if name in GATED else 1)])


def test_exact(backend: Backend) -> None:
    """f(0) = 0; far right f(x) = x and f'(x) = 1, far left both are 0; NaN stays; nothing empty."""
    for dtype in (*backend.dtypes, torch.float32):
        big = torch.finfo(dtype).max
        x = torch.tensor([0.0, 100, big, -200, -big, torch.nan], device=backend.device).to(dtype)
        for name, function in PLAIN.items():
            leaf = x.clone().requires_grad_()
            y = function(leaf)
            assert torch.equal(y[:3], x[:3]) and not y[3:5].any() and y[5].isnan(), name
            assert function(x[1:2] / 0).item() == math.inf, name
            (dx,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
            assert dx[[0, 1, 3]].tolist() == [0.5, 1, 0], name
        up = torch.full_like(x, 2)
        assert torch.equal(ops.swiglu(x, up)[:2], 2 * x[:2])
        assert ops.swiglu(torch.cat([x, up]).view(2, 6).flatten()).shape == (6,)
        assert ops.swiglu(x[:0].view(0, 4)).shape == (0, 2)
        empty = x[:0].clone().requires_grad_()
        assert torch.autograd.grad(ops.gelu(empty).sum(), empty)[0].shape == (0,)


def test_tails(backend: Backend) -> None:
    """The GELUs keep their relative accuracy far below 0, where 1 + erf(x / sqrt 2) cancels."""
    x = torch.linspace(-5, -1, 64, device=backend.device)
    for name in ("gelu", "gelu_tanh", "quick_gelu"):
        with reference_ops():
            exact = PLAIN[name](x.double())
        if name == "gelu":
            exact = x.double() * torch.special.ndtr(x.double())
        elif name == "gelu_tanh":
            z = math.sqrt(8 / math.pi) * (x.double() + 0.044715 * x.double() ** 3)
            exact = x.double() * z.sigmoid()
        assert ((PLAIN[name](x).double() - exact) / exact).abs().max() < 5e-6, name


def test_gradient(backend: Backend) -> None:
    small = [torch.randn(2, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    for function in PLAIN.values():
        assert torch.autograd.gradcheck(function, small[0])
    for gated in GATED.values():
        assert torch.autograd.gradcheck(gated, small)
    # The gradient of a sum has stride 0; that of a frozen part is not asked for.
    gate, up = (values((3, 16), backend, torch.float32) for _ in range(2))
    (dgate,) = torch.autograd.grad(ops.swiglu(gate.requires_grad_(), up).sum(), gate)
    (expected,) = torch.autograd.grad((F.silu(gate) * up).sum(), gate)
    torch.testing.assert_close(dgate, expected)


def test_saves_only_inputs(backend: Backend) -> None:
    gate_up = values((4, 32), backend, torch.bfloat16).requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        ops.swiglu(gate_up)
        ops.gelu(gate_up)
    assert [x.data_ptr() for x in saved] == [gate_up.data_ptr()] * 2


def test_compile(backend: Backend) -> None:
    gate, up = (values((3, 16), backend, torch.float32).requires_grad_() for _ in range(2))

    def run(gate: Tensor, up: Tensor) -> Tensor:
        y = ops.swiglu(ops.quick_gelu(gate * 2), up) + ops.geglu(torch.cat([gate, up], -1))
        return (ops.gelu(y) * ops.gelu(y, approximate="tanh")).sum()

    got = torch.compile(run, fullgraph=True, backend="aot_eager")(gate, up)
    expected = run(gate, up)
    torch.testing.assert_close(got, expected)
    grads = [torch.autograd.grad(loss, (gate, up)) for loss in (got, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["silu", "quick_gelu", "gelu", "gelu_tanh"])
def test_opcheck(backend: Backend, kind: str) -> None:
    registered = torch.ops.vlmkernels
    x, up = (values((3, 8), backend, torch.float32).requires_grad_() for _ in range(2))
    torch.library.opcheck(registered.activation.default, (x, kind))
    torch.library.opcheck(registered.gated_activation.default, (x, up, kind))
    torch.library.opcheck(registered.gated_activation.default, (x, None, kind))
    x, up = x.detach(), up.detach()
    torch.library.opcheck(registered.activation_backward.default, (x, up, kind))
    backward = registered.gated_activation_backward.default
    torch.library.opcheck(backward, (x, x, up, kind))
    torch.library.opcheck(backward, (x[:, :4].contiguous(), x, None, kind))


def test_memory(backend: Backend) -> None:
    """Halves of a fused projection, odd offsets, every second row: NaN between them is not read."""
    for dtype in backend.dtypes:
        for width, offset in ((24, 8), (24, 3), (7, 1)):
            wide = torch.full((5, 2, 2 * width + 9), torch.nan, device=backend.device).to(dtype)
            parts = wide[:, 0, offset : offset + width], wide[:, 0, offset + width : -9 + offset]
            for part in parts:
                part.normal_()
            gate, up = (part.clone() for part in parts)
            assert torch.equal(ops.swiglu(*parts), ops.swiglu(gate, up))
            fused = wide[:, 0, offset : offset + 2 * width].detach().requires_grad_()
            pair = [gate.requires_grad_(), up.requires_grad_()]
            y, expected = ops.swiglu(fused), ops.swiglu(*pair)
            assert torch.equal(y, expected)
            dy = torch.randn_like(y)
            (dfused,) = torch.autograd.grad(y, fused, dy)
            assert torch.equal(dfused, torch.cat(torch.autograd.grad(expected, pair, dy), dim=-1))
    x = torch.randn(6, 8, device=backend.device)
    torch.testing.assert_close(ops.quick_gelu(x.t()), ops.quick_gelu(x).t())
    torch.testing.assert_close(
        ops.swiglu(x[:, None].expand(6, 3, 8)), ops.swiglu(x)[:, None].expand(6, 3, 4)
    )


def test_replaces(backend: Backend) -> None:
    """Results and state_dict are those of torch's and transformers' modules."""
    x = values((3, 5, 48), backend, torch.float32)
    pairs: list[tuple[torch.nn.Module, torch.nn.Module]] = [
        (nn.GELU(), torch.nn.GELU()),
        (nn.GELU("tanh"), torch.nn.GELU("tanh")),
    ]
    activations = pytest.importorskip("transformers.activations")
    pairs += [
        (nn.QuickGELU(), activations.ACT2FN["quick_gelu"]),
        (nn.GELUTanh(), activations.ACT2FN["gelu_pytorch_tanh"]),
    ]
    from transformers import Qwen2Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

    mlp = Qwen2MLP(Qwen2Config(hidden_size=48, intermediate_size=72))
    ours = nn.SwiGLUMLP(48, 72)
    ours.load_state_dict(mlp.state_dict())
    pairs.append((ours.to(backend.device), mlp.to(backend.device)))
    for module, theirs in pairs:
        torch.testing.assert_close(module(x), theirs(x), atol=2e-6, rtol=1e-5)
    gate, up = x.chunk(2, dim=-1)
    torch.testing.assert_close(nn.SwiGLU()(x), F.silu(gate) * up)
    torch.testing.assert_close(nn.GEGLU("none")(gate, up), F.gelu(gate) * up, atol=2e-6, rtol=1e-5)


def test_any_strides(backend: Backend) -> None:
    """What lies behind a convolution has its channels far apart."""
    base = torch.randn(2, 8, 6, device=backend.device)
    for x in (base.transpose(1, 2), base[:, :, ::3], base.transpose(0, 1)):
        both = []
        for z in (x, x.contiguous()):
            leaf = z.detach().requires_grad_()
            y, both_halves = ops.swiglu(leaf, z), ops.geglu(leaf)
            (grad,) = torch.autograd.grad(y.sum() + both_halves.square().sum(), leaf)
            both.append([y, both_halves, grad])
        for a, b in zip(*both, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_bad_input(backend: Backend) -> None:
    x = torch.randn(4, 6, device=backend.device)
    with pytest.raises(TypeError, match=r"quick_gelu: x must be float64, .* got int64"):
        ops.quick_gelu(torch.arange(3, device=backend.device))
    with pytest.raises(TypeError, match=r"gelu: x must be a torch\.Tensor, got list"):
        ops.gelu([1.0])  # type: ignore[arg-type]
    for function in (ops.gelu, ops.geglu):
        with pytest.raises(ValueError, match="approximate must be 'none' or 'tanh', got 'erf'"):
            function(x, approximate="erf")
    with pytest.raises(ValueError, match=r"gate must have shape \(\.\.\., 2 \* dim\).* \(4, 5\)"):
        ops.swiglu(x[:, :5])
    with pytest.raises(ValueError, match=r"up must have the shape of gate \(4, 6\), got \(4, 5\)"):
        ops.swiglu(x, x[:, :5])
    with pytest.raises(TypeError, match="up must have the dtype of gate"):
        ops.swiglu(x, x.half())
    with pytest.raises(ValueError, match="kind must be silu, quick_gelu, gelu or gelu_tanh, got"):
        torch.ops.vlmkernels.activation(x, "relu")
    with pytest.raises(ValueError, match="activation_backward: dy must have the shape of x"):
        torch.ops.vlmkernels.activation_backward(x[:2], x, "gelu")
