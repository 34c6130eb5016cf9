"""qk_norm_rope, qk_norm_rope_from_tables: the six tests of a room, and transformers'."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.conftest import Backend
from tests.ops.test_rope import heads, positions
from vlmkernels import nn, ops
from vlmkernels.testing import assert_as_accurate, reference_ops

Function = Callable[..., tuple[Tensor, Tensor]]


def weights(head_dim: int, backend: Backend, dtype: torch.dtype) -> list[Tensor]:
    return [(torch.randn(head_dim, device=backend.device) + 1).to(dtype) for _ in range(2)]


def variants(tokens: tuple[int, ...], head_dim: int, backend: Backend) -> dict[str, Function]:
    """(q, k, q_weight, k_weight) -> (q, k), with each kind of angles on the same tokens."""
    pairs = head_dim // 2
    sections = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]
    one = positions(*tokens, backend=backend, high=10**6)
    three = positions(3, *tokens, backend=backend)
    angles = torch.randn(*tokens, pairs, device=backend.device)
    cos, sin = angles.cos(), angles.sin()
    partial = head_dim // 4 * 2
    return {
        "1-D": lambda *x: ops.qk_norm_rope(*x, one),
        "partial": lambda *x: ops.qk_norm_rope(*x, one.int(), rotary_dim=partial, eps=1e-3),
        "sections": lambda *x: ops.qk_norm_rope(*x, three, sections),
        "interleaved": lambda *x: ops.qk_norm_rope(*x, three, sections, interleaved=True),
        "tables": lambda *x: ops.qk_norm_rope_from_tables(*x, cos, sin),
    }


def results(function: Function, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    grads = [
        torch.linspace(-1, 1, x.numel(), device=x.device).view_as(x).to(x.dtype) for x in outputs
    ]
    return [*outputs, *torch.autograd.grad(outputs, leaves, grads)]


def check(function: Function, inputs: list[Tensor], name: str) -> None:
    """Forward and gradients against float64, with PyTorch in the same dtype as the yardstick."""
    got = results(function, inputs)
    with reference_ops():
        same = results(function, inputs)
        exact = results(function, [x.double() for x in inputs])
    assert all(x.is_contiguous() and x.isfinite().all() for x in got)
    parts = ("q", "k", "dq", "dk", "dq_weight", "dk_weight")
    for part, *values in zip(parts, got, same, exact, strict=True):
        assert_as_accurate(f"{name} {part}", *values)


@pytest.mark.parametrize("head_dim", [6, 64, 72, 80, 128, 256])
def test_accuracy(backend: Backend, head_dim: int) -> None:
    """q and k are slices of one tensor that holds NaN elsewhere."""
    for dtype in (*backend.dtypes, torch.float32):
        for weight_dtype in {dtype, torch.float32}:
            q, k = heads(5, 3, head_dim, backend=backend, dtype=dtype)
            inputs = [q, k, *weights(head_dim, backend, weight_dtype)]
            for name, function in variants((5,), head_dim, backend).items():
                check(function, inputs, f"{name} {dtype} {weight_dtype}")


@pytest.mark.parametrize("shape", [(1, 28, 128), (2, 9, 4, 64), (3, 1, 2, 32), (300, 3, 16)])
def test_shapes(backend: Backend, shape: tuple[int, ...]) -> None:
    """Packed and dense, one token, odd head counts; more tokens than CTAs and threads."""
    q, k = heads(*shape, backend=backend, dtype=torch.bfloat16)
    inputs = [q, k, *weights(shape[-1], backend, torch.float32)]
    for name, function in variants(shape[:-2], shape[-1], backend).items():
        check(function, inputs, name)


def test_exact(backend: Backend) -> None:
    """Heads of +-2 have rms 2, position 0 does not turn; one pair by one radian per position."""
    zero = torch.zeros(4, dtype=torch.int64, device=backend.device)
    for dtype in (*backend.dtypes, torch.float32):
        q = torch.randint(0, 2, (4, 3, 32), device=backend.device).to(dtype) * 4 - 2
        w, v = weights(32, backend, dtype)
        got = ops.qk_norm_rope(q, q[:, :1], w, v, zero, eps=0.0)
        assert torch.equal(got[0], q / 2 * w) and torch.equal(got[1], q[:, :1] / 2 * v)
        nothing = ops.qk_norm_rope(q[:0], q[:0, :1], w, v, zero[:0])
        assert [x.shape for x in nothing] == [(0, 3, 32), (0, 1, 32)]
    x = torch.zeros(4, 1, 8, device=backend.device)
    x[..., 0], x[..., 6] = 2, 2  # rms 1
    w = torch.arange(1.0, 9, device=backend.device)
    got, _ = ops.qk_norm_rope(
        x, x, w, w, torch.arange(4, device=backend.device), rotary_dim=4, eps=0.0
    )
    angle = torch.arange(4.0)
    expected = torch.zeros(4, 8)
    expected[:, 0], expected[:, 2], expected[:, 6] = 2 * angle.cos(), 2 * angle.sin(), 14
    torch.testing.assert_close(got[:, 0].cpu(), expected)


def test_gradient(backend: Backend) -> None:
    shapes = ((3, 2, 8), (3, 1, 8), 8, 8)
    small = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    for function in variants((3,), 8, Backend("cpu", "cpu", ())).values():
        assert torch.autograd.gradcheck(function, small)
    # No tokens; frozen weights; an unused k, whose gradient is zero.
    q, k = (x.clone() for x in heads(4, 3, 16, backend=backend, dtype=torch.float32))
    w, v = weights(16, backend, torch.float32)
    ids = positions(4, backend=backend)
    leaves = [x.requires_grad_() for x in (q[:0].clone(), w)]
    dq, dw = torch.autograd.grad(ops.qk_norm_rope(leaves[0], k[:0], w, v, ids[:0])[0].sum(), leaves)
    assert dq.shape == (0, 3, 16) and torch.equal(dw, torch.zeros_like(w))
    q, k = q.requires_grad_(), k.requires_grad_()
    out, _ = ops.qk_norm_rope(q, k, w.detach(), v, ids)
    dq, dk = torch.autograd.grad(out.sum(), (q, k))  # a sum's gradient has stride 0
    assert dq.abs().sum() > 0 and not dk.any()


def test_deterministic(backend: Backend) -> None:
    q, k = heads(300, 3, 32, backend=backend, dtype=torch.bfloat16)
    inputs = [q, k, *weights(32, backend, torch.bfloat16)]
    function = variants((300,), 32, backend)["1-D"]
    runs = [results(function, inputs) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_saves_only_inputs(backend: Backend) -> None:
    q, k = (x.clone() for x in heads(4, 3, 16, backend=backend, dtype=torch.bfloat16))
    inputs = [x.requires_grad_() for x in (q, k, *weights(16, backend, torch.float32))]
    ids = positions(4, backend=backend)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        ops.qk_norm_rope(*inputs, ids)
    assert [x.data_ptr() for x in saved] == [x.data_ptr() for x in (*inputs, ids)]


def test_compile(backend: Backend) -> None:
    q, k = (x.clone() for x in heads(4, 3, 16, backend=backend, dtype=torch.float32))
    inputs = [x.requires_grad_() for x in (q, k, *weights(16, backend, torch.float32))]
    for name, function in variants((4,), 16, backend).items():

        def run(*x: Tensor, function: Function = function) -> Tensor:
            a, b = function(x[0] * 2, *x[1:])
            return (a.square().sum(-1) + 1).sum() + (b * b.detach().cos()).sum()

        losses = torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs), run(*inputs)
        torch.testing.assert_close(*losses, msg=name)
        grads = [torch.autograd.grad(loss, inputs) for loss in losses]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, msg=name)


def test_opcheck(backend: Backend) -> None:
    q, k = (x.clone() for x in heads(4, 3, 16, backend=backend, dtype=torch.float32))
    inputs = [x.requires_grad_() for x in (q, k, *weights(16, backend, torch.float32))]
    registered, table = torch.ops.vlmkernels, torch.randn(4, 16, device=backend.device)
    angles = (positions(3, 4, backend=backend), 1e4, 16, [4, 2, 2], "interleaved")
    tables = (table, table, 16)
    torch.library.opcheck(registered.qk_norm_rope.default, (*inputs, 1e-6, *angles))
    torch.library.opcheck(registered.qk_norm_rope_from_tables.default, (*inputs, 1e-6, *tables))
    values = [x.detach() for x in inputs]
    for weight_grad in (True, False):
        arguments = (*values[:2], *values, weight_grad, 1e-6)
        torch.library.opcheck(registered.qk_norm_rope_backward.default, (*arguments, *angles))
        backward = registered.qk_norm_rope_from_tables_backward.default
        torch.library.opcheck(backward, (*arguments, *tables))


def test_transformers(backend: Backend) -> None:
    """The q and k that Qwen3VLTextAttention hands to its attention, from its own state_dict."""
    qwen3 = pytest.importorskip("transformers.models.qwen3_vl.modeling_qwen3_vl")
    from transformers import Qwen3VLConfig

    text = Qwen3VLConfig().text_config
    text.hidden_size, text.num_attention_heads, text.num_key_value_heads = 64, 4, 2
    text.head_dim, text.rope_parameters["mrope_section"] = 128, [24, 20, 20]
    attention = qwen3.Qwen3VLTextAttention(text, 0)
    for norm in (attention.q_norm, attention.k_norm):
        torch.nn.init.normal_(norm.weight, mean=1)
    x, ids = torch.randn(1, 6, 64), torch.randint(0, 1000, (3, 1, 6))
    tables = qwen3.Qwen3VLTextRotaryEmbedding(text)(x, ids)
    seen: list[Tensor] = []

    def spy(module: object, q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> object:
        seen.extend((q, k))
        return torch.zeros(1, 6, 4, 128), None

    interface = qwen3.ALL_ATTENTION_FUNCTIONS
    interface.register("vlmkernels_spy", spy)
    text._attn_implementation = "vlmkernels_spy"
    attention(x, tables, None)

    ours = nn.QKNormRotaryEmbedding(
        128,
        [24, 20, 20],
        interleaved=True,
        theta=text.rope_parameters["rope_theta"],
        eps=text.rms_norm_eps,
    )
    own = {name: w for name, w in attention.state_dict().items() if "norm" in name}
    assert list(own) == list(ours.state_dict()) == ["q_norm.weight", "k_norm.weight"]
    ours.load_state_dict(own)
    ours.to(backend.device)
    q, k = attention.q_proj(x).view(1, 6, 4, 128), attention.k_proj(x).view(1, 6, 2, 128)
    q, k = q.detach().to(backend.device), k.detach().to(backend.device)
    on_device = tuple(t.to(backend.device) for t in tables)
    for got in (ours(q, k, ids.to(backend.device)), ours(q, k, on_device)):
        for a, b in zip(got, seen, strict=True):
            torch.testing.assert_close(a.cpu(), b.transpose(1, 2), atol=1e-5, rtol=1e-5)


def test_bad_input(backend: Backend) -> None:
    q, k = heads(4, 3, 16, backend=backend, dtype=torch.float32)
    w, v = weights(16, backend, torch.float32)
    ids = positions(4, backend=backend)
    cos = torch.randn(4, 16, device=backend.device)
    with pytest.raises(ValueError, match=r"q must have shape \(num_tokens, .* got \(12, 16\)"):
        ops.qk_norm_rope(q.reshape(12, 16), k.reshape(8, 16), w, v, ids)
    with pytest.raises(ValueError, match=r"weight must have shape \(head_dim,\) = \(16,\), got"):
        ops.qk_norm_rope(q, k, w[:8], v, ids)
    with pytest.raises(TypeError, match="q_weight must be float32, got float16"):
        ops.qk_norm_rope(q, k, w.half(), v.half(), ids)
    with pytest.raises(TypeError, match="k_weight must have the dtype of q_weight"):
        ops.qk_norm_rope(q.half(), k.half(), w.half(), v, ids)
    with pytest.raises(ValueError, match=r"k must have the shape of q .* but for num_heads"):
        ops.qk_norm_rope(q, k[:3], w, v, ids)
    with pytest.raises(ValueError, match="eps must not be negative"):
        ops.qk_norm_rope(q, k, w, v, ids, eps=-1.0)
    with pytest.raises(ValueError, match=r"qk_norm_rope: sections must be three ints"):
        ops.qk_norm_rope(q, k, w, v, ids, [8])
    with pytest.raises(ValueError, match=r"position_ids must have shape \(3, 4\) .* got \(4,\)"):
        ops.qk_norm_rope(q, k, w, v, ids, [4, 2, 2])
    with pytest.raises(ValueError, match="q must have a contiguous last dimension"):
        ops.qk_norm_rope(q.transpose(1, 2), q.transpose(1, 2), w[:3], v[:3], ids, rotary_dim=2)
    with pytest.raises(ValueError, match=r"cos must be rotary_dim = 16 or rotary_dim/2 wide"):
        ops.qk_norm_rope_from_tables(q, k, w, v, cos[:, :4], cos[:, :4])
    with pytest.raises(TypeError, match="cos must be float32, got float16"):
        ops.qk_norm_rope_from_tables(q, k, w, v, cos.half(), cos.half())
