"""clip_loss and siglip_loss against open_clip's formulas: values, gradients, compile, memory."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, normalize

from tests.conftest import Backend
from vlmkernels import _core, ops
from vlmkernels.ops import _contrastive_chunks as chunks
from vlmkernels.ops import contrastive_loss as room
from vlmkernels.testing import assert_as_accurate, reference_ops
from vlmkernels.testing.memory import peak_bytes


def clip(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """open_clip's ClipLoss, written out."""
    by_image, by_text = scale * image @ text.T, scale * text @ image.T
    labels = torch.arange(len(image), device=image.device)
    return (cross_entropy(by_image, labels) + cross_entropy(by_text, labels)) / 2


def siglip(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """open_clip's SigLipLoss, written out."""
    logits = scale * image @ text.T + bias
    labels = 2 * torch.eye(len(image), dtype=image.dtype, device=image.device) - 1
    return -logsigmoid(labels * logits).sum() / len(image)


PAIRS = {"clip": (ops.clip_loss, clip), "siglip": (ops.siglip_loss, siglip)}
# batch, dim: one tile and several, edges, rows that lie together in runs of 2, 4, 8, 16 bytes.
SIZES = ((5, 3), (64, 32), (70, 27), (130, 20), (97, 66))


def inputs(kind: str, batch: int, dim: int, scale: float = 14.3, bias: float = -10) -> list[Tensor]:
    """Features in float64, as similar as those of a trained model."""
    image = normalize(torch.randn(batch, dim, dtype=torch.float64), dim=-1)
    text = normalize(image + 0.7 * torch.randn_like(image), dim=-1)
    scalars = [torch.tensor(x, dtype=torch.float64) for x in (scale, bias)]
    return [image, text, *scalars[: 1 if kind == "clip" else 2]]


def gradients(
    function: Callable[..., Tensor], tensors: list[Tensor], upstream: float = 1.0
) -> list[Tensor]:
    """The loss, then the gradient of each argument."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    loss = function(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss * upstream, leaves)]


def to(backend: Backend, tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Features in dtype; scale and bias as a parameter of a model holds them, in fp32."""
    scalar = torch.promote_types(dtype, torch.float32)
    return [x.to(backend.device, dtype if x.ndim else scalar) for x in tensors]


@pytest.mark.parametrize("kind", PAIRS)
def test_exact(backend: Backend, kind: str) -> None:
    """Orthogonal features, powers of two: every logit and product is exact, so is the rest."""
    dtype = backend.dtypes[0]
    features = torch.eye(64, dtype=torch.float64)
    zero, minus_inf = torch.tensor(0.0), torch.tensor(-200.0)
    if kind == "clip":  # p = 1 / 64 everywhere
        loss, dimage, dtext, dscale = gradients(
            ops.clip_loss, to(backend, [features, features, zero], dtype)
        )
        assert float(loss) == pytest.approx(math.log(64), abs=1e-6)
        assert not dimage.any() and not dtext.any()  # they are multiplied by the scale, 0
        assert float(dscale) == pytest.approx(1 / 64 - 1, abs=1e-6)
        return
    one = torch.tensor(1.0)
    loss, dimage, dtext, dscale, dbias = gradients(
        ops.siglip_loss, to(backend, [features, features, one, minus_inf], dtype)
    )
    assert float(loss) == 199  # the positives alone, -log(sigmoid(1 - 200))
    assert torch.equal(dimage.double().cpu(), -features / 64)
    assert torch.equal(dtext.double().cpu(), -features / 64)
    assert float(dscale) == -1 and float(dbias) == -1


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_accurate(backend: Backend, kind: str, size: tuple[int, int]) -> None:
    """Of several draws together: of one alone PyTorch's sums may be right by luck."""
    ours, open_clip = PAIRS[kind]
    names = ("loss", "dimage", "dtext", "dscale", "dbias")
    for dtype in backend.dtypes:
        draws = []
        for _ in range(1 if backend.small else 8):
            tensors = to(backend, inputs(kind, *size), dtype)
            got = gradients(ours, tensors, 3.0)
            assert got[0].dtype == torch.float32
            plain = gradients(open_clip, tensors, 3.0)
            exact = gradients(open_clip, [x.double() for x in tensors], 3.0)
            draws.append(list(zip(got, plain, exact, strict=True)))
        for name, results in zip(names, zip(*draws, strict=True), strict=False):
            a, b, want = (torch.stack(x) for x in zip(*results, strict=True))
            assert_as_accurate(name, a.to(dtype), b.to(dtype), want)


@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_accurate_loss(backend: Backend, scale: float) -> None:
    """The loss is fp32 whatever the features are: as accurate as fp32 PyTorch on the same numbers.

    Of a trained model it is small, beside logits as large as the scale."""
    for dtype in backend.dtypes:
        if backend.name == "cpu" and dtype == torch.bfloat16:
            continue  # PyTorch multiplies, and rounds its products to bf16
        tensors = to(backend, inputs("clip", 130, 64, scale), dtype)
        exact = clip(*[x.double() for x in tensors])
        plain = clip(*[x.float() for x in tensors])
        assert_as_accurate("loss", ops.clip_loss(*tensors), plain, exact)


def test_one_pair(backend: Backend) -> None:
    """Nothing to tell apart: no loss and no gradient for CLIP, one pair's sigmoid for SigLIP."""
    for dtype in backend.dtypes:
        clip_inputs = to(backend, inputs("clip", 1, 8), dtype)
        loss, *grads = gradients(ops.clip_loss, clip_inputs)
        assert abs(float(loss)) < 1e-6  # a rounding of the logit
        assert max(float(x.abs().max()) for x in grads) < 3e-5  # 14.3 roundings of the logit
        logit = 14.3 * (clip_inputs[0].double() @ clip_inputs[1].double().T) - 10
        loss = ops.siglip_loss(*clip_inputs, -10)
        assert float(loss) == pytest.approx(float(-logsigmoid(logit)), abs=0.05)


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("scale", [100.0, -30.0, 3000.0])
def test_safe(backend: Backend, kind: str, scale: float) -> None:
    """Logits far apart: exp of their differences would be 0 or infinite from a common maximum."""
    ours, open_clip = PAIRS[kind]
    dtype = backend.dtypes[-1]
    tensors = to(backend, inputs(kind, 70, 16, scale), dtype)
    for name, got, want in zip(
        ("loss", "dimage", "dtext"),
        gradients(ours, tensors),
        gradients(open_clip, [x.double() for x in tensors]),
        strict=False,
    ):
        error = (got.double() - want).abs().max() / want.abs().max()
        assert float(error) < 4e-3, name


def test_not_finite(backend: Backend) -> None:
    """A NaN or an infinity is never lost on the way to the loss."""
    for (kind, (ours, _)), bad in itertools.product(PAIRS.items(), (math.nan, math.inf)):
        image, text, *scalars = to(backend, inputs(kind, 40, 16), backend.dtypes[0])
        poisoned = [torch.full_like(scalars[0], bad), *scalars[1:]]
        assert not ours(image, text, *poisoned).isfinite()
        image[33, 3] = bad
        assert not ours(image, text, *scalars).isfinite()


@pytest.mark.parametrize("kind", PAIRS)
def test_gradient(backend: Backend, kind: str) -> None:
    """By finite differences; then each subset of the gradients alone, as in locked-image tuning."""
    ours, _ = PAIRS[kind]
    tensors = [x.to(backend.device).requires_grad_() for x in inputs(kind, 5, 4, 2.0, -1.0)]
    assert torch.autograd.gradcheck(ours, tensors)
    small = to(backend, inputs(kind, 20, 16), backend.dtypes[0])
    whole = gradients(ours, small)[1:]
    for wanted in itertools.product([False, True], repeat=len(small)):
        if any(wanted):
            leaves = [
                x.detach().requires_grad_(want) for x, want in zip(small, wanted, strict=True)
            ]
            ours(*leaves).backward()
            for leaf, want, gradient in zip(leaves, wanted, whole, strict=True):
                assert torch.equal(leaf.grad, gradient) if want else leaf.grad is None


@pytest.mark.parametrize("kind", PAIRS)
def test_panels(backend: Backend, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several panels of rows, the last one shorter, the result is what it is in one."""
    ours, open_clip = PAIRS[kind]
    tensors = to(backend, inputs(kind, 150, 24), backend.dtypes[0])
    exact = gradients(open_clip, [x.double() for x in tensors])
    whole = gradients(ours, tensors)
    for name in ("FORWARD_ROWS", "BACKWARD_ROWS"):
        monkeypatch.setattr(room, name, 64)
    for name in ("CHUNK_ROWS", "CHUNK_PRODUCTS"):
        monkeypatch.setattr(chunks, name, 64)
    for kept in (chunks.KEPT_BYTES, 0):  # products in memory for the backward, or multiplied again
        monkeypatch.setattr(chunks, "KEPT_BYTES", kept)
        parts = gradients(ours, tensors)
        for name, a, b, want in zip("litsb", parts, whole, exact, strict=False):
            assert_as_accurate(name, a, b, want)
    double = [x.to(backend.device) for x in inputs(kind, 150, 24)]  # chunks of plain PyTorch
    for a, b in zip(gradients(ours, double), gradients(open_clip, double), strict=True):
        torch.testing.assert_close(a, b)


def test_blocks(backend: Backend) -> None:
    """The statistics and gradients of blocks, as a ring of processes computes them, add up."""
    image, text, scale = to(backend, inputs("clip", 12, 8), backend.dtypes[0])
    exact = (scale.double() * image.double() @ text.double().T).cpu()
    rows, columns, positive = room.statistics(image[:5], text, scale, positives=False)
    assert positive.numel() == 0
    for lse, dim in ((rows, 1), (columns, 0)):
        got, want = lse.double().cpu().sum(0), exact[:5].logsumexp(dim)
        torch.testing.assert_close(got, want, atol=2e-2, rtol=1e-2)
    others = room.statistics(image[5:], text, scale, positives=False)[1]
    got, want = room.merge(columns, others).double().cpu().sum(0), exact.logsumexp(0)
    torch.testing.assert_close(got, want, atol=2e-2, rtol=1e-2)
    one = torch.ones((), device=backend.device)
    args = (image[:5], text, scale, None, rows, columns, one, False)
    both = room.gradients(*args, [1.0, 1.0], True, True)
    by_row = room.gradients(*args, [1.0, 0.0], True, False)
    by_column = room.gradients(*args, [0.0, 1.0], True, False)
    assert by_row[1].numel() == 0
    torch.testing.assert_close(by_row[0] + by_column[0], both[0], atol=0.05, rtol=0.02)
    torch.testing.assert_close(by_row[2] + by_column[2], both[2], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", PAIRS)
def test_compile(backend: Backend, kind: str) -> None:
    ours, _ = PAIRS[kind]
    tensors = to(backend, inputs(kind, 33, 16), backend.dtypes[0])
    compiled = torch.compile(lambda *x: ours(*x) * 2, fullgraph=True, backend="aot_eager")
    loss, *grads = gradients(compiled, tensors)
    plain, *want = gradients(ours, tensors, 2.0)
    assert torch.equal(loss, plain * 2)
    assert all(torch.equal(a, b) for a, b in zip(grads, want, strict=True))


def test_opcheck(backend: Backend) -> None:
    op = torch.ops.vlmkernels
    image, text, scale, bias = to(backend, inputs("siglip", 20, 16), backend.dtypes[0])
    lse = room.statistics(image, text, scale)[:2]
    one = torch.ones_like(scale)
    for want in ((True, True), (False, True)):
        for options in ((None, *lse), (bias, None, None)):
            args = (image, text, scale, *options, one, True, [1.0, 1.0], *want)
            torch.library.opcheck(op.contrastive_gradients.default, args)
    leaves = [x.requires_grad_() for x in (image, text, scale, bias)]
    torch.library.opcheck(op.clip_loss.default, tuple(leaves[:3]))
    torch.library.opcheck(op.siglip_loss.default, tuple(leaves))
    torch.library.opcheck(op.siglip_loss.default, (*leaves[:3], None))


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("offset", [3, 8])  # whole 16 bytes, as TMA wants them, or not
@pytest.mark.parametrize("size", [(40, 16), (70, 27)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_memory(backend: Backend, kind: str, offset: int, size: tuple[int, int]) -> None:
    """Features among NaN: nothing around them is read."""
    ours, _ = PAIRS[kind]
    batch, dim = size
    image, text, *scalars = to(backend, inputs(kind, *size), backend.dtypes[0])
    inside = []
    for features in (image, text):
        around = features.new_full((batch * dim + offset + dim,), torch.nan)
        part = around[offset : offset + batch * dim]
        inside.append(part.view(batch, dim).copy_(features))
    for got, want in zip(
        gradients(ours, [*inside, *scalars]), gradients(ours, [image, text, *scalars]), strict=True
    ):
        torch.testing.assert_close(got, want)
    strided = [x.repeat_interleave(2, dim=1)[:, ::2] for x in (image, text)]
    assert torch.equal(ours(*strided, *scalars), ours(image, text, *scalars))


@pytest.mark.parametrize("kind", PAIRS)
def test_peak_memory(backend: Backend, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No batch x batch matrix, forward or backward, of more than KEPT_BYTES."""
    if backend.small:
        pytest.skip("the panels of the CUDA kernels hold more rows than an emulated batch has")
    monkeypatch.setattr(chunks, "KEPT_BYTES", 0)
    ours, _ = PAIRS[kind]
    batch, dim = (16384, 64) if backend.name == "cuda" else (3072, 32)
    tensors = to(backend, inputs(kind, batch, dim), backend.dtypes[0])
    peak = peak_bytes(lambda: gradients(ours, tensors), backend.device)
    assert peak < batch * batch * 4 / 3


@pytest.mark.parametrize("kind", PAIRS)
def test_ampere(backend: Backend, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels for sm_80, which on Hopper only see features that TMA does not take."""
    if backend.name == "cpu":
        pytest.skip("CPU kernels know no GPU architecture")
    monkeypatch.setenv("VLMKERNELS_ARCH", "80")
    test_exact(backend, kind)
    for size in SIZES:
        test_accurate(backend, kind, size)
    for scale in (100.0, -30.0, 3000.0):
        test_safe(backend, kind, scale)
    test_panels(backend, kind, monkeypatch)


def test_deterministic(backend: Backend) -> None:
    for kind, (ours, _) in PAIRS.items():
        tensors = to(backend, inputs(kind, 130, 20), backend.dtypes[0])
        first = gradients(ours, tensors)
        for _ in range(2):
            for a, b in zip(first, gradients(ours, tensors), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("seed", [1, 2])
def test_seeds(backend: Backend, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another interleaving of warps, the same bits."""
    if not backend.small:
        pytest.skip("the order of warps is the emulator's")
    for kind, (ours, _) in PAIRS.items():
        tensors = to(backend, inputs(kind, 70, 40), backend.dtypes[0])
        want = gradients(ours, tensors)
        monkeypatch.setenv("PTXEMU_SEED", str(seed))
        for a, b in zip(gradients(ours, tensors), want, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", PAIRS)
def test_empty(backend: Backend, kind: str) -> None:
    """The mean of nothing is NaN, and its gradients are empty."""
    ours, _ = PAIRS[kind]
    tensors = to(backend, inputs(kind, 0, 8), backend.dtypes[0])
    loss, dimage, dtext, *_ = gradients(ours, tensors)
    assert loss.isnan() and dimage.shape == dtext.shape == (0, 8)


@pytest.mark.parametrize("kind", PAIRS)
def test_autocast(backend: Backend, kind: str) -> None:
    ours, _ = PAIRS[kind]
    tensors = to(backend, inputs(kind, 20, 16), torch.float32)
    leaves = [x.requires_grad_() for x in tensors]
    with torch.autocast(backend.device, torch.bfloat16):
        loss = ours(*leaves)
    loss.backward()
    half = [x.detach().to(torch.bfloat16) if x.ndim else x.detach() for x in tensors]
    assert torch.equal(loss, ours(*half))
    assert all(x.grad.dtype == torch.float32 for x in leaves)


def test_scalars(backend: Backend) -> None:
    """Floats, tensors of one element, half-precision parameters: one value each."""
    image, text, scale, bias = to(backend, inputs("siglip", 20, 16, 2.5, -1.5), backend.dtypes[0])
    want = ops.siglip_loss(image, text, scale, bias)
    assert torch.equal(ops.siglip_loss(image, text, 2.5, -1.5), want)
    assert torch.equal(ops.siglip_loss(image, text, scale.view(1).half(), bias.bfloat16()), want)
    assert torch.equal(ops.siglip_loss(image, text, scale), ops.siglip_loss(image, text, 2.5, 0))
    parameter = scale.view(1, 1).half().requires_grad_()
    ops.clip_loss(image, text, parameter).backward()
    assert parameter.grad.shape == (1, 1) and parameter.grad.dtype == torch.float16


def test_reference(backend: Backend) -> None:
    """The plain PyTorch path that transforms and unknown dtypes take computes the same."""
    for kind, (ours, _) in PAIRS.items():
        tensors = [x.to(backend.device) for x in inputs(kind, 9, 5)]
        with reference_ops():
            plain = gradients(ours, tensors)
        for a, b in zip(gradients(ours, tensors), plain, strict=True):
            torch.testing.assert_close(a, b)


def test_bad_input(backend: Backend) -> None:
    dtype = backend.dtypes[0]
    image, text, scale, bias = to(backend, inputs("siglip", 6, 8), dtype)
    wrong_values = {
        r"text_features must have the shape of image_features \(6, 8\), got \(5, 8\)": (
            *(image, text[:5], scale),
        ),
        r"text_features must have the shape of image_features \(6, 8\), got \(6, 7\)": (
            *(image, text[:, :7], scale),
        ),
        r"image_features must have shape \(batch, dim\), got \(2, 3, 8\)": (
            *(image.view(2, 3, 8), text, scale),
        ),
        r"logit_scale must be one value, got shape \(2,\)": (image, text, scale.repeat(2)),
        r"logit_scale must be finite, got inf": (image, text, math.inf),
        r"logit_scale must be finite, got nan": (image, text, math.nan),
    }
    for message, arguments in wrong_values.items():
        for kind, (ours, _) in PAIRS.items():
            with pytest.raises(ValueError, match=message):
                ours(*arguments, *([bias] if kind == "siglip" else []))
    wrong_types = {
        r"text_features must have the dtype of image_features": (image, text.double(), scale),
        r"image_features must be float64, float32, float16, bfloat16, got int32": (
            *(image.int(), text.int(), scale),
        ),
        r"logit_scale must be floating point, got torch.int64": (image, text, scale.long()),
        r"logit_scale must be a tensor or a float, got str": (image, text, "large"),
    }
    for message, arguments in wrong_types.items():
        with pytest.raises(TypeError, match=message):
            ops.clip_loss(*arguments)
    with pytest.raises(ValueError, match="logit_bias must be finite"):
        ops.siglip_loss(image, text, scale, math.inf)


def test_bad_core_arguments(backend: Backend) -> None:
    """The core itself refuses what the Python above it never asks for."""
    image, text, scale = to(backend, inputs("clip", 6, 8), backend.dtypes[-1])
    lse, positive = scale.new_empty((2, 6)), scale.new_empty(6)
    outputs = (lse, lse.clone(), positive, None)
    with pytest.raises(ValueError, match="statistics are those of CLIP"):
        _core.C.contrastive_forward(image, text, scale, None, True, *([None] * 4), None, 6)
    with pytest.raises(ValueError, match="panel_rows must be between 1 and the rows"):
        _core.C.contrastive_forward(image, text, scale, None, True, *outputs, lse, 7)
    with pytest.raises(ValueError, match="workspace must have shape"):
        _core.C.contrastive_forward(image, text, scale, None, True, *outputs, lse, 6)
