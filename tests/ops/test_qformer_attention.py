"""qformer_attention against projecting K and V: exact, accurate, gradients, compile, memory, bad
input; its two forms, lengths, masks and positions."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from tests.conftest import Backend
from vlmkernels import ops
from vlmkernels.ops.qformer_attention import cheaper_form, flops, reference
from vlmkernels.testing import assert_as_accurate

NAMES = ("q", "x", "weight_k", "weight_v", "bias_k", "bias_v")
# batch, num_queries, num_heads, head_dim, num_tokens, width; lengths
CASES = {
    "BLIP-2, narrow": ((2, 32, 3, 64, 257, 72), None),
    "two tokens": ((8, 9, 3, 8, 2, 16), None),
    "blocks of tokens": ((1, 17, 2, 40, 300, 48), [290]),  # two, the second of 18
    "three blocks": ((1, 16, 2, 64, 600, 40), None),
    "head_dim 128": ((2, 33, 2, 128, 150, 48), [150, 145]),
    "lengths": ((4, 20, 5, 32, 40, 56), [40, 0, 1, 17]),
    "many heads of one tile": ((1, 5, 11, 16, 20, 40), None),
    "odd sizes": ((2, 3, 2, 5, 7, 11), [4, 7]),  # no CUDA kernel: PyTorch's products
}
LARGE = {"large tiles": ((3, 32, 6, 64, 260, 200), [260, 3, 200])}


def inputs(case: str, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor | None]:
    (batch, queries, heads, dim, tokens, width), lengths = {**CASES, **LARGE}[case]
    shapes = [(batch, queries, heads, dim), (batch, tokens, width)]
    shapes += [(heads * dim, width)] * 2 + [(heads * dim,)] * 2
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    for weight in tensors[2:4]:
        weight *= width**-0.5
    lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    return [t.to(dtype) for t in tensors], lengths


def on(backend: Backend, tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [t.to(backend.device, dtype) for t in tensors]


def moved(lengths: Tensor | None, backend: Backend) -> Tensor | None:
    return None if lengths is None else lengths.to(backend.device)


def eager(
    *tensors: Tensor, key_lengths: Tensor | None = None, softmax_scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """What qformer_attention replaces, written by itself: projections, masked softmax, lse."""
    q, x, weight_k, weight_v, bias_k, bias_v = tensors
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    exists = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    if key_lengths is not None:
        exists = torch.arange(x.shape[1], device=x.device) < key_lengths[:, None]
    x = x.where(exists[..., None], 0)
    k = linear(x, weight_k, bias_k).unflatten(-1, q.shape[2:]).transpose(1, 2)
    v = linear(x, weight_v, bias_v).unflatten(-1, q.shape[2:]).transpose(1, 2)
    scores = (q.transpose(1, 2) @ k.mT * scale).masked_fill(~exists[:, None, None], -torch.inf)
    some = exists.any(1)[:, None, None, None]
    p = scores.where(some, 0).softmax(-1) * some
    return (p.to(q.dtype) @ v).transpose(1, 2), scores.to(_wide(q)).logsumexp(-1)


def _wide(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def gradients(function, tensors: list[Tensor], *douts: Tensor) -> list[Tensor]:
    """Results, then gradients of all tensors."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    outputs = function(*leaves)
    found = torch.autograd.grad(outputs, leaves, douts, allow_unused=True)
    return [*outputs, *(torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found))]  # noqa: B905


def douts(case: str) -> list[Tensor]:
    (batch, queries, heads, dim, _, _), lengths = {**CASES, **LARGE}[case]
    dlse = torch.randn(batch, heads, queries, dtype=torch.float64)
    if lengths is not None:  # there lse is -inf
        dlse[torch.tensor(lengths) == 0] = 0
    return [torch.randn(batch, queries, heads, dim, dtype=torch.float64), dlse]


@pytest.mark.parametrize("form", ["absorbed", "projected"])
def test_exact(backend: Backend, form: str) -> None:
    """Equal scores weigh all tokens alike; one far above the others takes its token alone."""
    for dtype in backend.dtypes:
        x = torch.randint(-8, 9, (2, 16, 24), device=backend.device).to(dtype)
        weight_v = torch.randint(-1, 2, (16, 24), device=backend.device).to(dtype)
        bias = torch.randint(-8, 9, (16,), device=backend.device).to(dtype)
        zero = x.new_zeros(16, 24)
        q = torch.ones(2, 3, 2, 8, device=backend.device, dtype=dtype)
        lengths = torch.tensor([16, 4], dtype=torch.int32, device=backend.device)
        out, lse = ops.qformer_attention(
            q, x, zero, weight_v, None, bias, key_lengths=lengths, form=form, return_lse=True
        )
        mean = torch.stack([x[0].double().mean(0), x[1, :4].double().mean(0)])
        want = (mean @ weight_v.double().t() + bias.double()).view(2, 1, 2, 8)
        if form == "absorbed":  # where v is rounded before
            assert torch.equal(out.double(), want.to(dtype).double().expand(q.shape))
        torch.testing.assert_close(out.double(), want.expand(q.shape), rtol=8e-3, atol=0)
        torch.testing.assert_close(
            lse, lengths.float().log()[:, None, None].expand(lse.shape), rtol=0, atol=1e-6
        )

        x[:, 2, 0] = 512
        weight_k = zero.clone()
        weight_k[:, 0] = 1
        out = ops.qformer_attention(q, x, weight_k, weight_v, form=form)
        want = linear(x[:, 2].double(), weight_v.double()).view(2, 1, 2, 8).expand(q.shape)
        assert torch.equal(out.double(), want.to(dtype).double())


def compare(backend: Backend, case: str, dtype: torch.dtype, form: str, factor: float) -> None:
    """out, lse and all gradients, lse's too, against float64."""
    tensors, lengths = inputs(case)
    lengths, tensors = moved(lengths, backend), on(backend, tensors, dtype)
    ends = [
        t.to(backend.device, d) for t, d in zip(douts(case), (dtype, torch.float32), strict=True)
    ]

    def ours(*t: Tensor):
        return ops.qformer_attention(*t, key_lengths=lengths, form=form, return_lse=True)

    def theirs(*t: Tensor) -> tuple[Tensor, Tensor]:
        return eager(*t, key_lengths=lengths)

    for name, got, same_dtype, exact in zip(
        ("out", "lse", *(f"d{name}" for name in NAMES)),
        gradients(ours, tensors, *ends),
        gradients(theirs, tensors, *ends),
        gradients(theirs, [t.double() for t in tensors], *(t.double() for t in ends)),
        strict=True,
    ):
        assert_as_accurate(name, got, same_dtype, exact, factor=factor)


@pytest.mark.parametrize("case", [*CASES, *LARGE])
def test_accurate(backend: Backend, case: str) -> None:
    for dtype in backend.dtypes[:1] if case in LARGE else backend.dtypes:
        compare(backend, case, dtype, "absorbed", 2.0)


@pytest.mark.parametrize("case", ["BLIP-2, narrow", "lengths"])
def test_projected(backend: Backend, case: str) -> None:
    # The error is attention's, which has a test of its own.
    compare(backend, case, backend.dtypes[0], "projected", 4.0)


@pytest.mark.parametrize("form", ["absorbed", "projected"])
def test_gradient(backend: Backend, form: str) -> None:
    """By finite differences; queries of each image and shared ones; with and without biases."""
    for batch, lengths, biases in ((2, None, 6), (1, [3, 0], 6), (1, [5, 2], 4)):
        tensors = [
            t.to(backend.device).requires_grad_()
            for t in (
                torch.randn(batch, 3, 2, 8, dtype=torch.float64),
                torch.randn(2, 5, 6, dtype=torch.float64),
                *(torch.randn(16, 6, dtype=torch.float64) for _ in range(2)),
                *(torch.randn(16, dtype=torch.float64) for _ in range(2)),
            )
        ]
        lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
        lengths = moved(lengths, backend)

        def call(*t: Tensor, lengths: Tensor | None = lengths) -> Tensor:
            out, lse = ops.qformer_attention(*t, key_lengths=lengths, form=form, return_lse=True)
            return torch.cat([out.flatten(), lse.where(lse != -torch.inf, 0).flatten()])

        assert torch.autograd.gradcheck(call, tensors[:biases])


def test_gradient_subsets(backend: Backend) -> None:
    """Each set of wanted gradients gives the same ones, bit by bit."""
    dtype = backend.dtypes[0]
    tensors, lengths = inputs("lengths")
    tensors, lengths = on(backend, tensors, dtype), moved(lengths, backend)
    dout = douts("lengths")[0].to(backend.device, dtype)

    def call(*t: Tensor) -> Tensor:
        return ops.qformer_attention(*t, key_lengths=lengths, form="absorbed")

    leaves = [t.clone().requires_grad_() for t in tensors]
    whole = torch.autograd.grad(call(*leaves), leaves, dout)
    assert not whole[4].any()  # bias_k
    for wanted in itertools.product([False, True], repeat=3):
        if any(wanted):
            wanted = (*wanted, True, False, False)
            leaves = [t.clone().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
            call(*leaves).backward(dout)
            for leaf, want, gradient in zip(leaves, wanted, whole, strict=True):
                assert torch.equal(leaf.grad, gradient) if want else leaf.grad is None


def test_shared_queries(backend: Backend) -> None:
    dtype = backend.dtypes[0]
    tensors, lengths = inputs("lengths")
    (q, *rest), lengths = on(backend, tensors, dtype), moved(lengths, backend)
    for form in ("absorbed", "projected"):

        def call(*t: Tensor, form: str = form) -> tuple[Tensor]:
            return (ops.qformer_attention(*t, key_lengths=lengths, form=form),)

        dout = torch.randn_like(q)
        got = gradients(call, [q[:1], *rest], dout)
        repeated = gradients(call, [q[:1].repeat(4, 1, 1, 1), *rest], dout)
        assert torch.equal(got[0], repeated[0])
        torch.testing.assert_close(
            got[1].float(), repeated[1].float().sum(0, keepdim=True), rtol=2e-2, atol=2e-2
        )


@pytest.mark.parametrize("form", ["absorbed", "projected"])
def test_compile(backend: Backend, form: str) -> None:
    dtype = backend.dtypes[0]
    tensors, lengths = inputs("lengths")
    tensors, lengths = on(backend, tensors, dtype), moved(lengths, backend)
    dout = douts("lengths")[0].to(backend.device, dtype)

    def call(*t: Tensor) -> tuple[Tensor]:
        return (ops.qformer_attention(*t, key_lengths=lengths, form=form) * 2,)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for got, want in zip(
        gradients(compiled, tensors, dout), gradients(call, tensors, dout), strict=True
    ):
        assert torch.equal(got, want)


def test_opcheck(backend: Backend) -> None:
    dtype = backend.dtypes[0]
    tensors, lengths = inputs("lengths")
    tensors, lengths = on(backend, tensors, dtype), moved(lengths, backend)
    leaves = [t.clone().requires_grad_() for t in tensors]
    op = torch.ops.vlmkernels.qformer_attention.default
    torch.library.opcheck(op, (*leaves, lengths, 0.25))
    torch.library.opcheck(op, (*leaves[:4], None, None, None, 0.25))
    out, lse = op(*tensors, lengths, 0.25)
    lse = lse.where(lse != -torch.inf, 0)
    op = torch.ops.vlmkernels.qformer_attention_backward.default
    for need_dx in (False, True):
        args = (out, None, torch.zeros_like(lse), *tensors[:4], lengths, lse, 0.25, need_dx)
        torch.library.opcheck(op, args)


@pytest.mark.parametrize("case", ["blocks of tokens", "lengths", "head_dim 128", "odd sizes"])
@pytest.mark.parametrize("form", ["absorbed", "projected"])
def test_memory(backend: Backend, case: str, form: str) -> None:
    """x within NaN, and NaN in the tokens that do not exist: neither reaches a result."""
    dtype = backend.dtypes[0]
    if form == "projected" and case == "odd sizes":
        return  # attention has no such head_dim
    tensors, lengths = inputs(case)
    (q, x, *rest), lengths = on(backend, tensors, dtype), moved(lengths, backend)
    dout = douts(case)[0].to(backend.device, dtype)
    exists = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
    around = x.new_full((x.shape[0], x.shape[1] + 2, x.shape[2] + 16), torch.nan)
    inside = around[:, 1:-1, 8:-8]
    inside[exists] = x[exists]

    def call(*t: Tensor) -> tuple[Tensor]:
        return (ops.qformer_attention(*t, key_lengths=lengths, form=form),)

    got = gradients(call, [q, inside, *rest], dout)
    want = gradients(call, [q, x, *rest], dout)
    for name, a, b in zip(("out", *NAMES), got, want, strict=True):
        assert torch.equal(a, b), name
    assert not got[2][~exists].any()


@pytest.mark.parametrize("form", ["absorbed", "projected"])
def test_mask(backend: Backend, form: str) -> None:
    """Any set of tokens, here with holes: as if the others were not there."""
    dtype = backend.dtypes[0]
    tensors, _ = inputs("lengths")
    q, x, *rest = on(backend, tensors, dtype)
    mask = torch.rand(x.shape[:2], device=x.device) < 0.5
    mask[1] = False
    poisoned = x.masked_fill(~mask[..., None], torch.nan)
    dout = douts("lengths")[0].to(backend.device, dtype)
    got = gradients(
        lambda *t: (ops.qformer_attention(*t, key_mask=mask, form=form),),
        [q, poisoned, *rest],
        dout,
    )
    for i, tokens in enumerate(mask):
        alone, *_ = gradients(
            lambda *t: (ops.qformer_attention(*t, form=form),),
            [q[i : i + 1], x[i : i + 1, tokens], *rest],
            dout[i : i + 1],
        )
        torch.testing.assert_close(got[0][i], alone[0], rtol=1e-2, atol=1e-2)
        assert not got[2][i, ~tokens].any()
    assert all(bool(t.isfinite().all()) for t in got)


def test_key_pos(backend: Backend) -> None:
    """Positions are seen by keys, not by values; a mask moves them with their tokens."""
    dtype = backend.dtypes[0]
    tensors, _ = inputs("lengths")
    q, x, weight_k, weight_v, bias_k, bias_v = on(backend, tensors, dtype)
    pos = torch.randn_like(x[0])
    mask = torch.rand(x.shape[:2], device=x.device) < 0.7
    got = ops.qformer_attention(
        q, x, weight_k, weight_v, bias_k, bias_v, key_pos=pos, key_mask=mask
    )
    k = linear((x + pos).double(), weight_k.double(), bias_k.double()).unflatten(-1, q.shape[2:])
    v = linear(x.double(), weight_v.double(), bias_v.double()).unflatten(-1, q.shape[2:])
    want = scaled_dot_product_attention(
        q.transpose(1, 2).double(), k.transpose(1, 2), v.transpose(1, 2), mask[:, None, None]
    ).transpose(1, 2)
    torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=4e-2)


def test_forms() -> None:
    """FLOPs as counted by hand for BLIP-2; the form that they choose is the one that runs."""
    blip2 = (32, 257, 12, 64, 1408)
    absorbed = 2 * (2 * 384 * 64 * 1408 + 2 * 384 * 1408 * 257)
    projected = 2 * (2 * 257 * 1408 * 768 + 2 * 12 * 32 * 257 * 64)
    assert flops("absorbed", *blip2) == absorbed
    assert flops("projected", *blip2) == projected
    assert cheaper_form(*blip2) == "absorbed"
    assert cheaper_form(256, 1024, 32, 128, 1664) == "projected"  # Qwen-VL
    # With many tokens the break-even is at head_dim queries.
    assert cheaper_form(60, 10**6, 12, 64, 1408) == "absorbed"
    assert cheaper_form(68, 10**6, 12, 64, 1408) == "projected"

    def runs(num_queries: int, **options) -> bool:
        """True when the absorbed op is called."""
        q, x, weight = torch.randn(1, num_queries, 1, 8), torch.randn(1, 64, 64), torch.randn(8, 64)
        with torch.profiler.profile() as profile:
            torch.compile(
                lambda: ops.qformer_attention(q, x, weight, weight, **options), backend="eager"
            )()
        names = {event.key for event in profile.key_averages()}
        assert ("vlmkernels::qformer_attention" in names) != ("vlmkernels::attention" in names)
        return "vlmkernels::qformer_attention" in names

    assert cheaper_form(*blip2, margin=2) == "projected"  # as on the CPU

    assert runs(2) and not runs(16)
    assert runs(16, form="absorbed") and not runs(2, form="projected")


def test_large_batch_in_parts(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward in parts of one image each differs by the rounding of the weights' gradients."""
    dtype = backend.dtypes[0]
    tensors, lengths = inputs("lengths")
    tensors, lengths = on(backend, tensors, dtype), moved(lengths, backend)
    dout = douts("lengths")[0].to(backend.device, dtype)

    def call(*t: Tensor) -> tuple[Tensor]:
        return (ops.qformer_attention(*t, key_lengths=lengths, form="absorbed"),)

    whole = gradients(call, tensors, dout)
    monkeypatch.setattr(
        sys.modules[reference.__module__], "_WORKSPACE_BYTES", {"cpu": 1, "cuda": 1}
    )
    for name, a, b in zip(("out", *NAMES), gradients(call, tensors, dout), whole, strict=True):
        if name.startswith("weight"):
            assert float((a - b).abs().max()) <= 2**-7 * float(b.abs().max()), name
        else:
            torch.testing.assert_close(a, b)


def test_deterministic(backend: Backend) -> None:
    dtype = backend.dtypes[0]
    tensors, lengths = inputs("large tiles")
    tensors, lengths = on(backend, tensors, dtype), moved(lengths, backend)
    dout = douts("large tiles")[0].to(backend.device, dtype)

    def call(*t: Tensor) -> tuple[Tensor]:
        return (ops.qformer_attention(*t, key_lengths=lengths, form="absorbed"),)

    first = gradients(call, tensors, dout)
    for a, b in zip(first, gradients(call, tensors, dout), strict=True):
        assert torch.equal(a, b)


def test_empty(backend: Backend) -> None:
    dtype = backend.dtypes[0]
    for form in ("absorbed", "projected"):
        for batch, queries, tokens in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
            tensors = [
                t.to(backend.device, dtype)
                for t in (
                    torch.randn(batch, queries, 2, 8),
                    torch.randn(batch, tokens, 16),
                    *(torch.randn(16, 16) for _ in range(2)),
                    *(torch.randn(16) for _ in range(2)),
                )
            ]

            def call(*t: Tensor, form: str = form) -> tuple[Tensor]:
                return (ops.qformer_attention(*t, form=form),)

            out, *found = gradients(call, tensors, torch.randn_like(tensors[0]))
            assert out.shape == tensors[0].shape and not out.any()
            for tensor, gradient in zip(tensors, found, strict=True):
                assert gradient.shape == tensor.shape and not gradient.any()


def test_autocast(backend: Backend) -> None:
    tensors, _ = inputs("BLIP-2, narrow", torch.float32)
    leaves = [t.to(backend.device).requires_grad_() for t in tensors]
    with torch.autocast(backend.device, torch.bfloat16):
        out = ops.qformer_attention(*leaves)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, ops.qformer_attention(*(t.bfloat16() for t in leaves)))
    out.sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)


@pytest.mark.parametrize("arch", ["90", "80"])
@pytest.mark.parametrize("seed", [1, 2])
def test_seeds(seed: int, arch: str) -> None:
    """Other interleavings of warps and delays of copies; without wgmma, too."""
    from tests.conftest import need_emulated_core

    need_emulated_core()
    names = "deterministic or (accurate and (tile or block or lengths or narrow))"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k",
         f"emulated and ({names})"],
        env=os.environ
        | {"PTXEMU_SEED": str(seed), "PTXEMU_SLICE": "50", "VLMKERNELS_ARCH": arch},
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:]


def test_bad_values(backend: Backend) -> None:
    tensors, _ = inputs("lengths")
    q, x, weight, _, bias, _ = on(backend, tensors, backend.dtypes[0])
    lengths = torch.full((4,), 40, dtype=torch.int32, device=backend.device)
    mask = torch.ones(x.shape[:2], dtype=torch.bool, device=backend.device)
    good = {"q": q, "x": x, "weight_k": weight, "weight_v": weight}
    wrong = {
        r"q must have shape \(batch, num_queries, num_heads, head_dim\), got": {"q": q[0]},
        r"x must have shape \(batch, num_tokens, width\), got \(40, 56\)": {"x": x[0]},
        r"q must have the batch of x \(4\) or 1, got 3": {"q": q[:3]},
        r"weight_k must have shape .* = \(160, 56\), got \(160, 55\)": {"weight_k": weight[:, 1:]},
        r"weight_v must have shape .* = \(160, 56\), got \(159, 56\)": {"weight_v": weight[1:]},
        r"bias_k must have shape .* = \(160,\), got \(3,\)": {"bias_k": bias[:3]},
        r"bias_v must have shape .* = \(160,\), got \(3,\)": {"bias_v": bias[:3]},
        r"key_lengths must have shape \(batch,\) = \(4,\), got \(3,\)": {
            "key_lengths": lengths[:3]
        },
        r"give key_lengths or key_mask, got both": {"key_lengths": lengths, "key_mask": mask},
        r"key_mask must have shape .* = \(4, 40\), got \(4, 39\)": {"key_mask": mask[:, 1:]},
        r"form must be one of auto, absorbed, projected, got 'fast'": {"form": "fast"},
        r"softmax_scale must be positive and finite, got 0": {"softmax_scale": 0.0},
        r"key_pos needs form 'projected'": {"key_pos": x[0], "form": "absorbed"},
    }
    if backend.device == "cpu":
        for length in (41, -1):
            wrong[rf"key_lengths must be from 0 to num_tokens \(40\), got {length}"] = {
                "key_lengths": lengths.clone().fill_(length)
            }
    for message, options in wrong.items():
        with pytest.raises(ValueError, match="qformer_attention: " + message):
            ops.qformer_attention(**good | options)


def test_bad_types(backend: Backend) -> None:
    tensors, _ = inputs("lengths")
    q, x, weight, _, bias, _ = on(backend, tensors, backend.dtypes[0])
    lengths = torch.full((4,), 40, dtype=torch.int64, device=backend.device)
    mask = torch.ones(x.shape[:2], dtype=torch.int64, device=backend.device)
    good = {"q": q, "x": x, "weight_k": weight, "weight_v": weight}
    wrong = {
        r"x must be float64, .* got int64": {"x": x.long()},
        r"q must have the dtype of x": {"q": q.double()},
        r"weight_v must have the dtype of x": {"weight_v": weight.double()},
        r"bias_v must have the dtype of x": {"bias_v": bias.double()},
        r"weight_k must be a plain torch.Tensor, got list": {"weight_k": [1.0]},
        r"key_lengths must be int32, got int64": {"key_lengths": lengths},
        r"key_mask must be bool, got torch.int64": {"key_mask": mask},
    }
    for message, options in wrong.items():
        with pytest.raises(TypeError, match="qformer_attention: " + message):
            ops.qformer_attention(**good | options)


def test_reference_is_the_op(backend: Backend) -> None:
    """Under reference_ops and in forward-mode AD, where the reference runs."""
    tensors, lengths = inputs("lengths")
    lengths = moved(lengths, backend)
    tensors = on(backend, tensors, torch.float64)
    out, lse = reference(*tensors, lengths, 0.25)
    want = eager(*tensors[:4], torch.zeros_like(tensors[4]), tensors[5], key_lengths=lengths,
                 softmax_scale=0.25)  # fmt: skip
    torch.testing.assert_close((out, lse), want)
