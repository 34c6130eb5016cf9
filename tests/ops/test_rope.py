"""rope, mrope, vision_rope, rope_from_tables: the six tests of a room, and transformers'."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.conftest import Backend
from vlmkernels import nn, ops
from vlmkernels.testing import assert_as_accurate, reference_ops

Rotation = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def heads(*shape: int, backend: Backend, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """q with shape (..., num_heads, head_dim) and k with one head less, slices of one tensor that
    holds NaN elsewhere; they start at an odd head, so that narrow vectors are needed for some."""
    *tokens, num_heads, head_dim = shape
    qkv = torch.full((*tokens, 2 * num_heads + 1, head_dim), torch.nan, device=backend.device)
    q, k = qkv[..., 1 : 1 + num_heads, :], qkv[..., 1 + num_heads : 2 * num_heads, :]
    q.normal_()
    k.normal_()
    qkv = qkv.to(dtype)
    return qkv[..., 1 : 1 + num_heads, :], qkv[..., 1 + num_heads : 2 * num_heads, :]


def positions(*shape: int, backend: Backend, high: int = 100) -> Tensor:
    return torch.randint(0, high, shape, device=backend.device)


def all_rotations(tokens: tuple[int, ...], head_dim: int, backend: Backend) -> dict[str, Rotation]:
    """Each public function on the same tokens; angles up to a position of one million."""
    pairs = head_dim // 2
    sections = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]
    one, three = (
        positions(*tokens, backend=backend, high=10**6),
        positions(3, *tokens, backend=backend),
    )
    angles = torch.randn(*tokens, pairs, device=backend.device)
    cos, sin = angles.cos(), angles.sin()
    rotations: dict[str, Rotation] = {
        "rope": lambda q, k: ops.rope(q, k, one),
        "int32, partial": lambda q, k: ops.rope(
            q, k, one.int(), rotary_dim=head_dim // 4 * 2, theta=5e5
        ),
        "mrope": lambda q, k: ops.mrope(q, k, three, sections),
        "interleaved": lambda q, k: ops.mrope(q, k, three, sections, interleaved=True),
        "tables": lambda q, k: ops.rope_from_tables(q, k, cos, sin),
    }
    if head_dim % 4 == 0:
        rotations["vision"] = lambda q, k: ops.vision_rope(q, k, three[:2])
    return rotations


def check(rotate: Rotation, q: Tensor, k: Tensor, name: str) -> None:
    """Forward and gradients against float64, with PyTorch in the same dtype as the yardstick."""

    def results(q: Tensor, k: Tensor) -> list[Tensor]:
        q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
        outputs = rotate(q, k)
        grads = [
            torch.linspace(-1, 1, x.numel(), device=x.device).view_as(x).to(x.dtype)
            for x in outputs
        ]
        return [*outputs, *torch.autograd.grad(outputs, (q, k), grads)]

    got = results(q, k)
    with reference_ops():
        same, exact = results(q, k), results(q.double(), k.double())
    assert all(x.is_contiguous() and x.isfinite().all() for x in got)
    for part, *values in zip(("q", "k", "dq", "dk"), got, same, exact, strict=True):
        assert_as_accurate(f"{name} {part}", *values)


@pytest.mark.parametrize("head_dim", [64, 72, 80, 88, 96, 104, 128, 256])
def test_accuracy(backend: Backend, head_dim: int) -> None:
    for dtype in (*backend.dtypes, torch.float32):
        q, k = heads(5, 3, head_dim, backend=backend, dtype=dtype)
        for name, rotate in all_rotations((5,), head_dim, backend).items():
            check(rotate, q, k, f"{name} {dtype}")


@pytest.mark.parametrize(
    "shape", [(1, 28, 128), (2, 9, 4, 72), (3, 1, 2, 64), (40, 33, 8), (7, 2, 6)]
)
def test_shapes(backend: Backend, shape: tuple[int, ...]) -> None:
    """Packed and dense, one token, odd head counts, head_dim that is no multiple of 4; batches."""
    q, k = heads(*shape, backend=backend, dtype=torch.bfloat16)
    for name, rotate in all_rotations(shape[:-2], shape[-1], backend).items():
        check(rotate, q, k, name)


def test_batch_of_positions(backend: Backend) -> None:
    """One row of positions, or of tables, serves all rows; strides of positions are free."""
    q, k = heads(3, 4, 2, 16, backend=backend, dtype=torch.float32)
    row = positions(1, 4, backend=backend)
    expected = ops.rope(q, k, row.expand(3, 4).contiguous())
    cos, sin = torch.randn(2, 1, 4, 16, device=backend.device)
    for got in (ops.rope(q, k, row), ops.rope(q, k, row.expand(3, 4))):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    tables = ops.rope_from_tables(q, k, cos, sin)
    repeated = ops.rope_from_tables(q, k, cos.repeat(3, 1, 1), sin.repeat(3, 1, 1)[..., :8])
    assert all(torch.equal(a, b) for a, b in zip(tables, repeated, strict=True))


def test_exact(backend: Backend) -> None:
    for dtype in (*backend.dtypes, torch.float32):
        q, k = heads(4, 3, 32, backend=backend, dtype=dtype)
        zero = torch.zeros(4, dtype=torch.int64, device=backend.device)
        assert all(torch.equal(a, b) for a, b in zip(ops.rope(q, k, zero), (q, k), strict=True))
        nothing = ops.rope(q[:0], k[:, :0][:0], zero[:0])
        assert [x.shape for x in nothing] == [(0, 3, 32), (0, 0, 32)]
    # Pair 0 turns by one radian for each position; elements beyond rotary_dim stay as they are.
    x = torch.zeros(4, 1, 8, device=backend.device)
    x[..., 0], x[..., 6] = 1, 5
    got, _ = ops.rope(x, x, torch.arange(4, device=backend.device), rotary_dim=4)
    for position in range(4):
        expected = [math.cos(position), 0.0, math.sin(position), 0.0, 0.0, 0.0, 5.0, 0.0]
        torch.testing.assert_close(got[position, 0].tolist(), expected, atol=1e-6, rtol=0)


def test_inverse_of_the_rotation_is_its_gradient(backend: Backend) -> None:
    q, k = heads(6, 3, 64, backend=backend, dtype=torch.float32)
    q, k = q.clone().requires_grad_(), k.clone().requires_grad_()
    outputs = ops.rope(q, k, positions(6, backend=backend))
    dq, dk = torch.autograd.grad(outputs, (q, k), [x.detach() for x in outputs])
    torch.testing.assert_close(dq, q.detach())
    torch.testing.assert_close(dk, k.detach())
    ones = torch.autograd.grad(ops.rope(q, k, positions(6, backend=backend))[0].sum(), q)[0]
    assert ones.isfinite().all()  # the gradient of a sum has stride 0
    small = [torch.randn(3, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    ids = positions(3, 3, backend=backend).to("cpu")
    assert torch.autograd.gradcheck(lambda q, k: ops.mrope(q, k, ids, [2, 1, 1]), small)


def test_large_positions(backend: Backend) -> None:
    """cos and sin stay accurate to fp32 rounding up to positions of two thousand million."""
    ids = torch.tensor([1, 10**3, 10**6, 10**8, 2**31 - 1], device=backend.device)
    x = torch.zeros(5, 1, 128, device=backend.device)
    x[..., :64] = 1
    got, _ = ops.rope(x, x, ids)
    inv_freq = 1.0 / (10000.0 ** (torch.arange(0, 128, 2).float() / 128))
    angles = (ids.cpu().float().unsqueeze(-1) * inv_freq).double()
    exact = torch.cat([angles.cos(), angles.sin()], dim=-1)
    assert (got[:, 0].double().cpu() - exact).abs().max() < 1.5e-7


@pytest.mark.parametrize(
    "name", ["rope", "int32, partial", "mrope", "interleaved", "tables", "vision"]
)
def test_inplace(backend: Backend, name: str) -> None:
    q, k = heads(5, 3, 16, backend=backend, dtype=torch.bfloat16)
    base = q._base
    assert base is not None
    ids, three = positions(5, backend=backend), positions(3, 5, backend=backend)
    tables = torch.randn(2, 5, 16, device=backend.device)

    def rotate(q: Tensor, k: Tensor, inplace: bool) -> tuple[Tensor, Tensor]:
        return {
            "rope": lambda: ops.rope(q, k, ids, inplace=inplace),
            "int32, partial": lambda: ops.rope(q, k, ids.int(), rotary_dim=8, inplace=inplace),
            "mrope": lambda: ops.mrope(q, k, three, [4, 2, 2], inplace=inplace),
            "interleaved": lambda: ops.mrope(
                q, k, three, [4, 2, 2], interleaved=True, inplace=inplace
            ),
            "tables": lambda: ops.rope_from_tables(q, k, *tables, inplace=inplace),
            "vision": lambda: ops.vision_rope(q, k, three[:2], inplace=inplace),
        }[name]()

    expected, before, untouched = rotate(q, k, False), base.clone(), base[:, :1].isnan().all()
    compiled = torch.compile(lambda q, k: rotate(q, k, True), fullgraph=True, backend="aot_eager")
    for run in (rotate, compiled):
        base.copy_(before)
        version = q._version
        got = run(q, k, True) if run is rotate else run(q, k)
        assert got[0] is q and got[1] is k and q._version > version
        assert all(torch.equal(a, b) for a, b in zip((q, k), expected, strict=True))
        assert untouched and base[:, 0].isnan().all() and base[:, 6:].isnan().all()
    with pytest.raises(ValueError, match="inplace=True has no gradient"):
        rotate(q.detach().requires_grad_(), k, True)


def test_compile(backend: Backend) -> None:
    q, k = (
        x.clone().requires_grad_() for x in heads(4, 3, 16, backend=backend, dtype=torch.float32)
    )
    for name, rotate in all_rotations((4,), 16, backend).items():

        def run(q: Tensor, k: Tensor, rotate: Rotation = rotate) -> Tensor:
            a, b = rotate(q * 2, k)
            return (a.square().sum(-1) + 1).sum() + (b * b.detach().cos()).sum()

        got, expected = torch.compile(run, fullgraph=True, backend="aot_eager")(q, k), run(q, k)
        torch.testing.assert_close(got, expected, msg=name)
        for a, b in zip(
            torch.autograd.grad(got, (q, k)), torch.autograd.grad(expected, (q, k)), strict=True
        ):
            torch.testing.assert_close(a, b, msg=name)


def test_opcheck(backend: Backend) -> None:
    q, k = (
        x.clone().requires_grad_() for x in heads(4, 3, 16, backend=backend, dtype=torch.float32)
    )
    ids = positions(3, 4, backend=backend)
    table = torch.randn(4, 16, device=backend.device)
    registered, options = torch.ops.vlmkernels, (1e4, 16, [4, 2, 2], "sections")
    torch.library.opcheck(registered.rope.default, (q, k, ids, *options, False))
    torch.library.opcheck(registered.rope_from_tables.default, (q, k, table, table, 16, False))
    with torch.no_grad():
        q, k = q.detach().clone(), k.detach().clone()
        torch.library.opcheck(registered.rope_.default, (q, k, ids, *options))
        torch.library.opcheck(registered.rope_from_tables_.default, (q, k, table, table, 16))


def test_transformers(backend: Backend) -> None:
    """Angles, tables and rotations are those of transformers' Qwen2-VL and Qwen3-VL."""
    qwen2 = pytest.importorskip("transformers.models.qwen2_vl.modeling_qwen2_vl")
    qwen3 = pytest.importorskip("transformers.models.qwen3_vl.modeling_qwen3_vl")
    from transformers import Qwen2VLConfig, Qwen3VLConfig

    q, k = heads(1, 6, 4, 128, backend=backend, dtype=torch.float32)
    three = positions(3, 1, 6, backend=backend, high=10**6)
    for module, config, sections, interleaved in (
        (qwen2.Qwen2VLRotaryEmbedding, Qwen2VLConfig(), [16, 24, 24], False),
        (qwen3.Qwen3VLTextRotaryEmbedding, Qwen3VLConfig(), [24, 20, 20], True),
    ):
        text = config.text_config
        text.head_dim, text.rope_parameters["mrope_section"] = 128, sections
        cos, sin = module(text)(q.cpu(), three.cpu())
        expected = qwen2.apply_rotary_pos_emb(q.cpu(), k.cpu(), cos, sin, unsqueeze_dim=2)
        rotary = nn.MRotaryEmbedding(
            sections, interleaved=interleaved, theta=text.rope_parameters["rope_theta"]
        )
        tables = (cos.to(q.device), sin.to(q.device))
        for got in (rotary(q, k, three), ops.rope_from_tables(q, k, *tables)):
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a.cpu(), b, atol=1e-6, rtol=0)
    config = Qwen2VLConfig(vision_config={"embed_dim": 320, "num_heads": 4}).vision_config
    q, k = heads(6, 4, 80, backend=backend, dtype=torch.float32)
    ids = positions(2, 6, backend=backend, high=1000)
    cos, sin = qwen2.Qwen2VLVisionRotaryEmbedding(config)(q.cpu(), ids.t().cpu())
    expected = qwen2.apply_rotary_pos_emb_vision(q.cpu(), k.cpu(), cos, sin)
    for a, b in zip(nn.VisionRotaryEmbedding()(q, k, ids), expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, atol=1e-6, rtol=0)
    one = nn.RotaryEmbedding(theta=1e6)(q, k, ids[0])
    same = nn.MRotaryEmbedding([14, 13, 13])(q, k, ids[:1].expand(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))


def test_bad_inplace(backend: Backend) -> None:
    """What would be rotated twice is refused; interleaved slices of one tensor are not."""
    ids = positions(4, backend=backend)
    flat = torch.randn(4 * 6 * 16, device=backend.device)
    a = flat.view(4, 6, 16)
    with pytest.raises(ValueError, match="q and k must not share their memory"):
        ops.rope(a, a, ids, inplace=True)
    with pytest.raises(ValueError, match="q and k must not share their memory"):
        ops.rope_from_tables(a, a[:, :2], *torch.randn(2, 4, 16).to(a.device), inplace=True)
    for strides in ((16, 16, 1), (32, 8, 1), (0, 16, 1)):
        with pytest.raises(ValueError, match="must not overlap itself"):
            ops.rope(flat.as_strided((4, 3, 16), strides), a[:, 5:], ids, inplace=True)
    q, k = a.view(4, 2, 3, 16)[:, :, 1], a.view(4, 2, 3, 16)[:, :, 2]
    expected = ops.rope(q, k, ids)
    for got, value in zip(ops.rope(q, k, ids, inplace=True), expected, strict=True):
        assert torch.equal(got, value)


def test_inplace_partial_overlap(backend: Backend) -> None:
    """Any byte that q and k share is found; what lies between each other's heads is none."""
    ids = positions(4, backend=backend)
    flat = torch.randn(4 * 8 * 16 + 64, device=backend.device)
    a = flat[: 4 * 8 * 16].view(4, 8, 16)
    shifted = flat[8 : 8 + 4 * 8 * 16].view(4, 8, 16)
    shared = [
        (a[:, :4], a[:, 3:]),  # one head in both
        (a[:, :4], shifted[:, 3:6]),  # half a head
        (a[:, :4], shifted[:, 7:]),  # the next token's first
        (a[:3], a[1:]),  # whole tokens
        (a[:, :2], flat.as_strided((4, 1, 16), (96, 16, 1), 64)),  # other strides
    ]
    for q, k in shared:
        with pytest.raises(ValueError, match="q and k must not share their memory"):
            ops.rope(q, k, ids[: q.shape[0]], inplace=True)
    apart = [
        (a[:, ::2], a[:, 1::2]),
        (a[:2], a[2:]),
        (a[::2], a[1::2]),
        (a.view(2, 2, 8, 16)[:, :, :5], a.view(2, 2, 8, 16)[:, :, 5:]),
        (a[:, :2], flat.as_strided((4, 1, 16), (128, 16, 1), 40)),
    ]
    for q, k in apart:
        row = positions(*q.shape[:-2], backend=backend)
        expected = ops.rope(q, k, row)
        for got, value in zip(ops.rope(q, k, row, inplace=True), expected, strict=True):
            assert torch.equal(got, value)


def fused(*tokens: int, head_dim: int, backend: Backend, dtype: torch.dtype) -> Tensor:
    """(..., 3, 2, head_dim), every second head of a tensor that holds NaN elsewhere."""
    wide = torch.full((*tokens, 3, 4, head_dim), torch.nan, device=backend.device)
    wide[..., ::2, :] = torch.randn(*tokens, 3, 2, head_dim, device=backend.device)
    return wide.to(dtype)[..., ::2, :]


@pytest.mark.parametrize("tokens", [(5,), (2, 3), (1,), (0,)])
@pytest.mark.parametrize("head_dim", [8, 72, 80])
def test_qkv(backend: Backend, tokens: tuple[int, ...], head_dim: int) -> None:
    """The same bits as of slices of qkv, forward and backward; v is not copied."""
    ids = positions(2, *tokens, backend=backend)
    for dtype in backend.dtypes:
        qkv = fused(*tokens, head_dim=head_dim, backend=backend, dtype=dtype).requires_grad_()
        q, k, v = qkv.unbind(-3)
        expected = (*ops.vision_rope(q, k, ids), v)
        got = ops.vision_rope_qkv(qkv, ids)
        grads = [torch.randn(x.shape, device=x.device).to(dtype) for x in got]
        pairs = [*zip(got, expected, strict=True)]
        pairs.append(
            tuple(torch.autograd.grad(x, qkv, grads)[0] for x in (got, expected))  # type: ignore[arg-type]
        )
        for a, b in pairs:
            assert torch.equal(a, b)
        if qkv.numel():
            assert got[2].data_ptr() == qkv[..., 2, :, :].data_ptr()
        if head_dim == 80:  # one part of the result is not used
            (dqkv,) = torch.autograd.grad(ops.vision_rope_qkv(qkv, ids)[1].sum(), qkv)
            assert not dqkv[..., ::2, :, :].any()
        inplace = qkv.detach()
        with torch.no_grad():
            rotated = ops.vision_rope_qkv(inplace, ids, inplace=True)
        assert all(torch.equal(a, b) for a, b in zip(rotated, expected, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(inplace.unbind(-3), expected, strict=True))


def test_qkv_dispatcher(backend: Backend) -> None:
    qkv = fused(4, head_dim=16, backend=backend, dtype=torch.float32).requires_grad_()
    ids = positions(2, 4, backend=backend)

    def run(qkv: Tensor) -> Tensor:
        q, k, v = ops.vision_rope_qkv(qkv * 2, ids)
        return (q * k.cos() * v).sum()

    losses = torch.compile(run, fullgraph=True, backend="aot_eager")(qkv), run(qkv)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, qkv)[0] for loss in losses))
    options = (ids, 1e4, 16, [4, 4], "axial")
    registered = torch.ops.vlmkernels
    torch.library.opcheck(registered.rope_qkv.default, (qkv, *options))
    q, k, v = qkv.detach().unbind(-3)
    torch.library.opcheck(registered.rope_qkv_backward.default, (q, k, v, *options))
    torch.library.opcheck(registered.rope_qkv_.default, (qkv.detach().clone(), *options))
    small = torch.randn(2, 3, 1, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.vision_rope_qkv(x, ids.cpu()[:, :2]), small)
    with pytest.raises(ValueError, match=r"qkv must have shape \(num_tokens, 3, .* got \(4, 2, 2"):
        ops.vision_rope_qkv(qkv[:, :2], ids)
    with pytest.raises(ValueError, match="inplace=True has no gradient"):
        ops.vision_rope_qkv(qkv, ids, inplace=True)
    with pytest.raises(ValueError, match="qkv must not overlap itself"):
        ops.vision_rope_qkv(qkv.detach()[:1].expand(4, 3, 2, 16), ids, inplace=True)
    with pytest.raises(ValueError, match=r"position_ids must have shape \(2, 4\) .* got \(2, 3\)"):
        ops.vision_rope_qkv(qkv, ids[:, :3])
    with pytest.raises(TypeError, match=r"qkv must be float64, .* got int32"):
        ops.vision_rope_qkv(qkv.int(), ids)


def test_fake_tensors_stay_out_of_the_cache(backend: Backend) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    theta = 12345.0 + backend.small  # no other test has asked for it
    with FakeTensorMode(), reference_ops():
        x = torch.empty(4, 3, 16, device=backend.device)
        ids = torch.empty(4, dtype=torch.int64, device=backend.device)
        assert ops.rope(x, x, ids, theta=theta)[0].shape == x.shape
    q, k = heads(4, 3, 16, backend=backend, dtype=torch.float32)
    ids = positions(4, backend=backend)
    got = ops.rope(q, k, ids, theta=theta)
    with reference_ops():
        for a, b in zip(got, ops.rope(q, k, ids, theta=theta), strict=True):
            torch.testing.assert_close(a, b)


def test_bad_input(backend: Backend) -> None:
    q, k = heads(4, 3, 16, backend=backend, dtype=torch.float32)
    ids = positions(4, backend=backend)
    cos = torch.randn(4, 16, device=backend.device)
    with pytest.raises(
        ValueError, match=r"rope: q must have shape \(num_tokens, .* got \(12, 16\)"
    ):
        ops.rope(q.reshape(12, 16), k.reshape(8, 16), ids)
    with pytest.raises(ValueError, match=r"rope: k must have the shape of q .* but for num_heads"):
        ops.rope(q, k[:3], ids)
    with pytest.raises(ValueError, match="rope: q must have a contiguous last dimension"):
        ops.rope(q.transpose(1, 2), q.transpose(1, 2), ids, rotary_dim=2)
    with pytest.raises(
        TypeError, match=r"rope: k must have the dtype of q \(float32\), got float16"
    ):
        ops.rope(q, k.half(), ids)
    with pytest.raises(TypeError, match=r"rope: q must be float64, .* got int32"):
        ops.rope(q.int(), k.int(), ids)
    with pytest.raises(TypeError, match="rope: position_ids must be int32, int64, got float32"):
        ops.rope(q, k, ids.float())
    with pytest.raises(ValueError, match=r"position_ids must have shape \(4,\) .* got \(3,\)"):
        ops.rope(q, k, ids[:3])
    with pytest.raises(ValueError, match=r"position_ids must have shape \(3, 4\) .* got \(2, 4\)"):
        ops.mrope(q, k, ids.expand(2, 4), [4, 2, 2])
    with pytest.raises(
        ValueError, match=r"sections must .* sum to rotary_dim/2 = 8, got \[4, 2, 3\]"
    ):
        ops.mrope(q, k, ids.expand(3, 4), [4, 2, 3])
    with pytest.raises(ValueError, match=r"sections \[1, 5, 2\] cannot be interleaved"):
        ops.mrope(q, k, ids.expand(3, 4), [1, 5, 2], interleaved=True)
    with pytest.raises(ValueError, match=r"rotary_dim must be even and in 2\.\.256, got 7"):
        ops.rope(q, k, ids, rotary_dim=7)
    with pytest.raises(ValueError, match=r"at most head_dim \(16\), got 32"):
        ops.rope(q, k, ids, rotary_dim=32)
    with pytest.raises(ValueError, match=r"cos must be rotary_dim = 16 or rotary_dim/2 wide"):
        ops.rope_from_tables(q, k, cos[:, :4], cos[:, :4])
    with pytest.raises(TypeError, match="cos must be float32, got float16"):
        ops.rope_from_tables(q, k, cos.half(), cos.half())
    for sections in ([8], [4, 4], [2, 2, 2, 2], [4.0, 2.0, 2.0]):
        axes = ids.expand(len(sections), 4)
        for interleaved in (False, True):
            with pytest.raises(ValueError, match="sections must be three ints"):
                ops.mrope(q, k, axes, sections, interleaved=interleaved)  # type: ignore[arg-type]
    for theta in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="theta must be finite and above 0"):
            ops.rope(q, k, ids, theta=theta)
    registered = torch.ops.vlmkernels.rope.default
    for sections, layout in (([2] * 4, "sections"), ([], "sections"), ([8], "interleaved")):
        with pytest.raises(ValueError, match="sections must be of three axes at most"):
            registered(q, k, ids.expand(4, 4), 1e4, 16, sections, layout, False)
    with pytest.raises(ValueError, match="must not overlap itself"):
        ops.rope(q[:, :1].expand(4, 3, 16), k, ids, inplace=True)
