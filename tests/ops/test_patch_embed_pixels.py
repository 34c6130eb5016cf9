"""patch_embed_pixels against normalise-then-convolve: exact, accurate, gradients, bad input."""

import contextlib
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional
from torch import Tensor

from tests.conftest import Backend, need_emulated_core
from vlmkernels import ops
from vlmkernels.ops.patch_embed import reference_pixels
from vlmkernels.testing import assert_as_accurate, emulate

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
CLIP: dict[str, Any] = {"mean": MEAN, "std": STD}
PLAIN: dict[str, Any] = {"mean": [0.0] * 3, "std": [1.0] * 3, "rescale": 1.0}  # integers stay so

# images, weight, merge_size; several images: a sequence.
CASES = {
    "ViT 16x16": ([(2, 3, 32, 48)], (24, 3, 16, 16), 1),
    "CLIP 14x14, border": ([(2, 3, 33, 48)], (40, 3, 14, 14), 1),
    "SigLIP blocks": ([(2, 3, 56, 84)], (24, 3, 14, 14), 2),
    "3x5, border": ([(2, 3, 10, 21)], (20, 3, 3, 5), 1),
    "video 2x14x14": ([(1, 3, 4, 28, 28)], (24, 3, 2, 14, 14), 1),
    "video in blocks": ([(2, 3, 4, 16, 32)], (9, 3, 2, 4, 8), 2),
    "still 14x14": ([(2, 3, 28, 56)], (24, 3, 2, 14, 14), 2),
    "Qwen2-VL": ([(3, 28, 56), (3, 84, 28), (3, 56, 56)], (24, 3, 2, 14, 14), 2),
    "Qwen3-VL 16x16": ([(3, 32, 64), (3, 96, 32)], (24, 3, 2, 16, 16), 2),
    "packed, raster": ([(3, 42, 14), (3, 14, 28), (3, 28, 42)], (24, 3, 14, 14), 1),
    "packed, 3x3 blocks": ([(3, 9, 27), (3, 27, 18)], (7, 3, 3, 3), 3),
    "rows": ([(33, 588)], (24, 3, 14, 14), 1),
    "rows, still": ([(33, 588)], (24, 3, 2, 14, 14), 1),
    "rows, odd": ([(70, 27)], (8, 27), 1),
}
LARGE_CASES = {  # large tiles; dweight in splits; more tiles than a GPU has SMs
    "1296 patches to 1272": ([(1, 3, 144, 144)], (1272, 3, 4, 4), 1),
    "1120 patches to 8": ([(3, 60, 64), (3, 40, 16)], (8, 3, 2, 2), 2),
    "K 768 to 264": ([(1, 3, 48, 160)], (264, 3, 16, 16), 1),
    "K 1536 to 264": ([(1, 3, 4, 32, 48)], (264, 3, 2, 16, 16), 1),  # more than stays in memory
}


def make(case: str, dtype: torch.dtype, device: str, pixels: torch.dtype = torch.uint8) -> Any:
    """images, weight, bias, pos_embed of small integers, merge_size."""
    shapes, weight, merge = (CASES | LARGE_CASES)[case]
    images: Any = [torch.randint(0, 2, shape).to(device, pixels) for shape in shapes]
    images = images if len(shapes) > 1 else images[0]
    tensors = [torch.randint(-1, 2, shape).to(device, dtype) for shape in (weight, weight[:1])]
    tokens = expected(images, *(t.double() for t in tensors), None, PLAIN, merge)
    pos_embed = torch.randint(-2, 3, tokens.shape[-2:]).to(device, dtype)
    return images, *tensors, pos_embed, merge


def expected(
    images: Any, weight: Tensor, bias: Any, pos_embed: Any, how: dict[str, Any], merge: int
) -> Tensor:
    """The processor's rescale and normalise, then torch's own convolution, image by image."""
    if isinstance(images, list):
        images = [image[None] for image in images]
        return torch.cat([expected(x, weight, bias, None, how, merge)[0] for x in images]) + (
            0 if pos_embed is None else pos_embed
        )
    shape = [-1, *[1] * (images.ndim - 2)] if images.ndim > 2 else [-1, 1]
    mean, std = (
        torch.tensor(how[name], dtype=weight.dtype).view(shape) for name in ("mean", "std")
    )
    x = images.to(weight.dtype)
    x = x.view(len(x), 3, -1) if x.ndim == 2 else x
    x = (x * how.get("rescale", 1 / 255) - mean) / std
    if images.ndim == 2:
        frames = math.prod(weight.shape[1:]) // images.shape[1]  # a still row has one
        x = x.unflatten(2, (1, -1)).expand(-1, -1, frames, -1) if frames > 1 else x
        y = x.reshape(len(x), -1) @ weight.flatten(1).t() + (0 if bias is None else bias)
    else:
        if weight.ndim == 5 and x.ndim == 4:
            x = x[:, :, None].expand(-1, -1, weight.shape[2], -1, -1)
        conv = torch.nn.functional.conv2d if weight.ndim == 4 else torch.nn.functional.conv3d
        y = in_blocks(conv(x, weight, bias, stride=weight.shape[2:]), merge)
    return y if pos_embed is None else y + pos_embed


def in_blocks(y: Tensor, m: int) -> Tensor:
    """(num_images, hidden_dim, (t,) h, w) -> (num_images, num_patches, hidden_dim)."""
    y = y.unflatten(-1, (-1, m)).unflatten(-3, (-1, m)).transpose(-3, -2)
    return y.flatten(2).transpose(1, 2)


def gradients(function: Any, tensors: list[Tensor], dy: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    return torch.autograd.grad(function(*leaves), leaves, dy)


@pytest.mark.parametrize("case", [*CASES, *LARGE_CASES])
def test_exact(backend: Backend, case: str) -> None:
    """Small integers have no rounding: tokens and every gradient must be right to the bit."""
    for dtype in backend.dtypes[:1] if case in LARGE_CASES else backend.dtypes:
        images, weight, bias, pos_embed, merge = make(case, dtype, backend.device)
        tensors = [weight, bias, pos_embed]

        def ours(*t: Tensor, images: Any = images, merge: int = merge) -> Tensor:
            return ops.patch_embed_pixels(images, *t, **PLAIN, merge_size=merge)

        def exact(*t: Tensor, images: Any = images, merge: int = merge) -> Tensor:
            images = [x.cpu() for x in images] if isinstance(images, list) else images.cpu()
            return expected(images, *t, PLAIN, merge)

        wanted = [t.cpu().double() for t in tensors]
        want = exact(*wanted)
        y = ours(*tensors)
        assert y.dtype == dtype and want.abs().max() <= 256
        assert torch.equal(y.cpu().double(), want)
        dy = (torch.rand(want.shape) < 0.1).double()
        got = gradients(ours, tensors, dy.to(backend.device, dtype))
        for name, value, gradient in zip(
            ("dweight", "dbias", "dpos"), got, gradients(exact, wanted, dy), strict=True
        ):
            assert gradient.abs().max() <= 256
            assert torch.equal(value.cpu().double(), gradient), name


@pytest.mark.parametrize("case", ["CLIP 14x14, border", "Qwen2-VL", "video 2x14x14", "rows, still"])
def test_accurate(backend: Backend, case: str) -> None:
    """Against float64; PyTorch in the same dtype normalises, rounds, then multiplies."""
    shapes, shape, merge = CASES[case]
    for dtype in backend.dtypes:
        images: Any = [torch.randint(0, 256, s, dtype=torch.uint8) for s in shapes]
        images = [x.to(backend.device) for x in images] if len(shapes) > 1 else images[0]
        weight, bias = torch.randn(shape) / 20, torch.randn(shape[:1])
        tensors = [t.to(backend.device, dtype) for t in (weight, bias)]
        exact = [t.double() for t in tensors]

        def ours(*t: Tensor, images: Any = images, merge: int = merge) -> Tensor:
            return ops.patch_embed_pixels(images, *t, **CLIP, merge_size=merge)

        def theirs(*t: Tensor, images: Any = images, merge: int = merge) -> Tensor:
            return expected(images, *t, None, CLIP, merge)

        y = ours(*tensors)
        assert_as_accurate("y", y, theirs(*tensors), theirs(*exact))
        dy = torch.randn(y.shape).to(dtype)
        for name, got, same_dtype, want in zip(
            ("dweight", "dbias"),
            gradients(ours, tensors, dy),
            gradients(theirs, tensors, dy),
            gradients(theirs, exact, dy.double()),
            strict=True,
        ):
            assert_as_accurate(name, got, same_dtype, want)


@pytest.mark.parametrize("std", [STD, [0.5] * 3], ids=["CLIP", "SigLIP"])
def test_rounding(backend: Backend, std: list[float]) -> None:
    """At most what normalising to bfloat16 rounds, 1.7e-3 RMS; nothing where stds are equal."""
    weight = (torch.randn(64, 3, 14, 14) / 24).bfloat16().to(backend.device)
    how = {"mean": MEAN, "std": std}
    for high in (256, 16):  # any picture; a dark one
        images = torch.randint(0, high, (1, 3, 56, 56), dtype=torch.uint8)
        exact = expected(images, weight.cpu().double(), None, None, how, 1)
        y = ops.patch_embed_pixels(images.to(backend.device), weight, **how).cpu().double()
        rounding = rms(exact.bfloat16().double() - exact)  # of the tokens themselves
        error = math.sqrt(max(0.0, rms(y - exact) ** 2 - rounding**2)) / rms(exact)
        if backend.name == "cpu":
            assert error < 1.9e-3  # PyTorch's product, of normalised rows
        else:
            assert error < (1.5e-3 if std == STD else 2e-4)


def rms(x: Tensor) -> float:
    return float(x.pow(2).mean().sqrt())


@pytest.mark.parametrize("case", ["CLIP 14x14, border", "SigLIP blocks", "Qwen2-VL", "3x5, border"])
def test_float_pixels(backend: Backend, case: str) -> None:
    """Pixels of weight's dtype, with their gradient; those in no patch have none."""
    for dtype in backend.dtypes:
        images, weight, bias, pos_embed, merge = make(case, dtype, backend.device, dtype)
        several = isinstance(images, list)
        tensors = [weight, bias, pos_embed, *(images if several else [images])]

        def ours(w: Tensor, b: Tensor, p: Tensor, *x: Tensor, merge: int = merge) -> Tensor:
            pixels: Any = list(x) if len(x) > 1 else x[0]
            return ops.patch_embed_pixels(pixels, w, b, p, **PLAIN, merge_size=merge)

        def exact(w: Tensor, b: Tensor, p: Tensor, *x: Tensor, merge: int = merge) -> Tensor:
            return expected(list(x) if len(x) > 1 else x[0], w, b, p, PLAIN, merge)

        wanted = [t.cpu().double() for t in tensors]
        want = exact(*wanted)
        assert torch.equal(ours(*tensors).cpu().double(), want)
        dy = (torch.rand(want.shape) < 0.1).double()
        for value, gradient in zip(
            gradients(ours, tensors, dy.to(backend.device, dtype)),
            gradients(exact, wanted, dy),
            strict=True,
        ):
            assert torch.equal(value.cpu().double(), gradient)


def test_gradient(backend: Backend) -> None:
    """By finite differences, through normalisation and the sum over frames."""
    weight, bias = torch.randn(3, 2, 2, 2, 3).double(), torch.randn(3).double()
    for shape, merge in (((2, 2, 5, 6), 1), ((1, 2, 4, 12), 2), ((1, 2, 4, 4, 3), 1)):
        x = torch.rand(shape).double()

        def run(x: Tensor, w: Tensor, b: Tensor, merge: int = merge) -> Tensor:
            return ops.patch_embed_pixels(
                x, w, b, mean=[0.4, 0.5], std=[0.2, 0.3], rescale=0.5, merge_size=merge
            )

        leaves = [t.to(backend.device).requires_grad_() for t in (x, weight, bias)]
        assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("case", ["3x5, border", "packed, 3x3 blocks", "still 14x14"])
def test_compile(backend: Backend, case: str) -> None:
    dtype = backend.dtypes[0]
    images, *tensors, merge = make(case, dtype, backend.device)

    def run(*t: Tensor) -> Tensor:
        return ops.patch_embed_pixels(images, *t, **PLAIN, merge_size=merge) * 2

    y = run(*tensors)
    dy = torch.randint_like(y, 2)
    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, want in zip(
        gradients(compiled, tensors, dy), gradients(run, tensors, dy), strict=True
    ):
        assert torch.equal(got, want)


def test_opcheck(backend: Backend) -> None:
    dtype = backend.dtypes[0]
    op, numbers = torch.ops.vlmkernels, ([0.5] * 3, [0.25] * 3, 1 / 255)
    images, weight, bias, pos_embed, merge = make("3x5, border", dtype, backend.device)
    leaves = [t.requires_grad_() for t in (weight.clone(), bias, pos_embed)]
    torch.library.opcheck(op.patch_embed_pixels.default, (images, *leaves, None, *numbers, merge))
    grid = torch.tensor([[1, 2, 4], [1, 6, 2]])
    packed = torch.randint(0, 256, (20 * 27,), dtype=torch.uint8, device=backend.device)
    weight = torch.randn(8, 3, 3, 3).to(backend.device, dtype)
    torch.library.opcheck(
        op.patch_embed_pixels.default,
        (packed, weight.clone().requires_grad_(), None, None, grid, *numbers, 2),
    )
    dy = torch.randn(20, 8).to(backend.device, dtype)
    torch.library.opcheck(
        op.patch_embed_pixels_dweight.default, (dy, packed, weight, True, grid, *numbers, 2)
    )
    torch.library.opcheck(
        op.patch_embed_pixels_dx.default, (dy, weight, grid, *numbers, 2, [20 * 27])
    )


@pytest.mark.parametrize("case", ["CLIP 14x14, border", "3x5, border", "video 2x14x14", "rows"])
def test_memory(backend: Backend, case: str) -> None:
    """Images at an odd place amid other bytes, whatever those are: they do not matter."""
    dtype = backend.dtypes[0]
    images, weight, bias, pos_embed, merge = make(case, dtype, backend.device)
    seen = []
    for noise in (0, 255):
        around = images.new_full([size + 3 for size in images.shape], noise)
        inside = around[tuple(slice(1, 1 + size) for size in images.shape)]
        if images.ndim > 2:  # nor does what fills no patch
            sizes = zip(images.shape[2:], weight.shape[-images.ndim + 2 :], strict=True)
            kept = (..., *(slice(0, n // p * p) for n, p in sizes))
            inside[kept].copy_(images[kept])
        else:
            inside.copy_(images)
        y = ops.patch_embed_pixels(inside, weight, bias, pos_embed, **CLIP, merge_size=merge)
        dweight = gradients(
            lambda w, x=inside: ops.patch_embed_pixels(x, w, **CLIP, merge_size=merge), [weight], y
        )
        seen.append((y, *dweight))
    assert torch.equal(seen[0][0], seen[1][0]) and torch.equal(seen[0][1], seen[1][1])


def test_packed_is_the_sequence(backend: Backend) -> None:
    dtype = backend.dtypes[0]
    images, weight, bias, pos_embed, merge = make("Qwen2-VL", dtype, backend.device)
    grid = torch.tensor([[1, x.shape[1] // 14, x.shape[2] // 14] for x in images])
    packed = torch.cat([x.flatten() for x in images])
    want = ops.patch_embed_pixels(images, weight, bias, pos_embed, **CLIP, merge_size=merge)
    for kind in (torch.int32, torch.int64):
        got = ops.patch_embed_pixels(
            *(packed, weight, bias, pos_embed), **CLIP, grid_thw=grid.to(kind), merge_size=merge
        )
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    "shape", [[], (0, 3, 28, 28), (0, 3, 1, 1), (0, 588), (0, 3, 2, 28, 28)], ids=str
)
def test_no_images(backend: Backend, shape: Any) -> None:
    dtype, weight = backend.dtypes[0], (8, 3, 2, 14, 14)
    tensors = [torch.randn(s).to(backend.device, dtype) for s in (weight, (8,))]
    images: Any = torch.zeros(shape, dtype=torch.uint8).to(backend.device) if shape else []

    def run(*t: Tensor) -> Tensor:
        return ops.patch_embed_pixels(images, *t, **CLIP)

    y = run(*tensors)
    assert y.numel() == 0 and y.shape[-1] == 8
    dweight, dbias = gradients(run, tensors, y)
    assert dweight.shape == weight and not dweight.any() and not dbias.any()


@pytest.mark.parametrize("seed", [1, 2])
def test_seeds(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other interleavings of warps and delays of copies: the result must not depend on them."""
    need_emulated_core()
    monkeypatch.setenv("PTXEMU_SEED", str(seed))
    images, weight, bias, pos_embed, merge = make("Qwen2-VL", torch.bfloat16, "cpu")
    want = expected(images, weight.double(), bias.double(), pos_embed.double(), PLAIN, merge)
    with emulate():
        y = ops.patch_embed_pixels(images, weight, bias, pos_embed, **PLAIN, merge_size=merge)
    assert torch.equal(y, want.bfloat16())


def photograph() -> np.ndarray[Any, Any]:
    return pytest.importorskip("sklearn.datasets").load_sample_image("china.jpg")  # 427 x 640


def test_order_of_qwen2_vl_rows() -> None:
    """Weights that copy pixels out: tokens are the rows of transformers' processor, bit for bit."""
    processors = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    processor = processors.Qwen2VLImageProcessorPil(
        do_resize=False, do_rescale=False, do_normalize=False
    )
    picture = photograph()
    crops = [picture[:84, :140], picture[200:256, 100:268]]
    theirs = processor(crops, return_tensors="pt")
    columns = 3 * 14 * 14
    weight = torch.zeros(columns, 3, 2, 14, 14)
    weight[:, :, 0] = torch.eye(columns).view(-1, 3, 14, 14)  # the first of two equal frames
    images = [torch.tensor(crop).permute(2, 0, 1) for crop in crops]
    rows = theirs["pixel_values"].unflatten(1, (3, 2, 196))
    for device in (contextlib.nullcontext, emulate):
        if device is emulate:
            need_emulated_core()
            images, rows = images[:1], rows[:60]
        with device():
            dtype = torch.float32 if device is not emulate else torch.bfloat16
            got = ops.patch_embed_pixels(images, weight.to(dtype), **PLAIN, merge_size=2)
        assert torch.equal(got.float().unflatten(1, (3, 196)), rows[:, :, 0])
        assert torch.equal(rows[:, :, 0], rows[:, :, 1])
    assert theirs["image_grid_thw"].tolist() == [[1, 6, 10], [1, 4, 12]]


def test_bad_input(backend: Backend) -> None:
    dtype = backend.dtypes[0]
    weight, bias = torch.randn(4, 3, 2, 2).to(dtype), torch.randn(4).to(dtype)
    weight, bias = weight.to(backend.device), bias.to(backend.device)
    x = torch.zeros(2, 3, 8, 8, dtype=torch.uint8, device=backend.device)
    grid = torch.tensor([[1, 4, 4], [1, 4, 4]])
    run = ops.patch_embed_pixels
    good: dict[str, Any] = {"images": x, "weight": weight, "bias": bias, **CLIP}
    packed = {"images": x.flatten(), "grid_thw": grid}
    wrong_values: dict[str, dict[str, Any]] = {
        "mean must have a value for each of 3 channels, got 2": {"mean": MEAN[:2]},
        "std must have a value for each of 3 channels, got 4": {"std": [*STD, 1.0]},
        "std must be positive and finite, got 0": {"std": [0.5, 0.0, 0.5]},
        "mean must be finite, got nan": {"mean": [math.nan, 0.0, 0.0]},
        "rescale must be positive and finite, got 0": {"rescale": 0.0},
        "merge_size must be at least 1, got 0": {"merge_size": 0},
        "images must have multiples of merge_size patches .*, got 4 x 4": {"merge_size": 3},
        r"images must hold at least one patch": {"images": x[..., :1]},
        "images must have channels = 3 like weight": {"images": x[:, :2]},
        r"images must have shape .*, got \(3, 8, 8\)": {"images": x[0]},
        "grid_thw must be given for packed images": {"images": x.flatten()},
        "grid_thw must be None but for packed images": {"grid_thw": grid},
        r"grid_thw must count the 32 patches of images, got 16": packed | {"grid_thw": grid[:1]},
        r"grid_thw must count the 32 patches .*, got 48 or more": packed
        | {"grid_thw": grid.repeat(2, 1)},
        r"grid_thw must hold \(1, h, w\) .* got \(2, 4, 4\) for image 0": packed
        | {"grid_thw": grid * torch.tensor([2, 1, 1])},
        r"grid_thw must hold .* got \(1, -4, -4\) for image 0": packed
        | {"grid_thw": grid * torch.tensor([1, -1, -1])},
        r"grid_thw must hold .* merge_size = 3, got \(1, 4, 4\)": packed | {"merge_size": 3},
        r"grid_thw must have shape \(num_images, 3\), got \(2, 2\)": packed
        | {"grid_thw": grid[:, :2].contiguous()},
        "images must hold whole patches of 12 pixels": packed | {"images": x.flatten()[:-1]},
        r"images\[1\] must have h and w multiples of .*\(2, 2\), got \(3, 7, 8\)": {
            "images": [x[0], x[0, :, :7]]
        },
        r"images\[0\] must have shape \(3, h, w\), got \(8, 8\)": {"images": [x[0, 0]]},
        "merge_size must be 1 for patch rows": {"images": x.view(-1, 12), "merge_size": 2},
        r"bias must have shape \(hidden_dim,\)": {"bias": bias[:3]},
        r"pos_embed must have shape \(num_patches, hidden_dim\) = \(16, 4\)": {
            "pos_embed": weight.new_zeros(15, 4)
        },
    }
    for message, arguments in wrong_values.items():
        with pytest.raises(ValueError, match=f"patch_embed_pixels: {message}"):
            run(**good | arguments)
    wrong_types: dict[str, dict[str, Any]] = {
        "images must be uint8 or of weight's dtype .*, got int64": {"images": x.long()},
        "images must be uint8 or of weight's dtype .*, got float64": {"images": x.double()},
        r"images\[1\] must have the dtype and device": {"images": [x[0], x[0].float()]},
        r"images\[0\] must be a torch.Tensor, got list": {"images": [[1]]},
        "weight must be float64, .*, got uint8": {"weight": x},
        "bias must have the dtype": {"bias": bias.double()},
        "grid_thw must be int32, int64, got float32": packed | {"grid_thw": grid.float()},
    }
    for message, arguments in wrong_types.items():
        with pytest.raises(TypeError, match=f"patch_embed_pixels: {message}"):
            run(**good | arguments)


def test_reference_is_differentiable() -> None:
    """torch.func goes through the reference: its result is the op's."""
    images, weight, bias, pos_embed, merge = make("Qwen2-VL", torch.float32, "cpu")
    grid = torch.tensor([[1, x.shape[1] // 14, x.shape[2] // 14] for x in images])
    packed = torch.cat([x.flatten() for x in images])
    numbers = (PLAIN["mean"], PLAIN["std"], 1.0, merge)
    got = reference_pixels(packed, weight, bias, pos_embed, grid, *numbers)
    assert torch.equal(got, expected(images, weight, bias, pos_embed, PLAIN, merge))

    def total(w: Tensor) -> Tensor:
        return ops.patch_embed_pixels(images, w, bias, **CLIP, merge_size=merge).sum()

    leaf = weight.clone().requires_grad_()
    total(leaf).backward()
    torch.testing.assert_close(torch.func.grad(total)(weight), leaf.grad)
