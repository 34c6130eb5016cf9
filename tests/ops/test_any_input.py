"""Whatever tensor stands in one argument's place, an op computes or raises ValueError or TypeError.

What it computes is what it computes from contiguous tensors. Nothing else: no crash, no error from
a kernel, no other exception. (Under emulation a kernel that
reads out of bounds is a RuntimeError.)
"""

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import Backend
from vlmkernels import ops

DTYPES = [
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    *(torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64),
]


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Rank 0 to 5, sizes around those of the valid arguments, any dtype, maybe odd strides."""
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 8, 16]), max_size=5))
    dtype = draw(st.sampled_from(DTYPES))
    x = torch.ones(shape).to(dtype)
    if dtype.is_floating_point:
        x = (torch.arange(x.numel()) % 13 / 4 + 1).view(shape).to(dtype)
    way = draw(st.sampled_from(["plain", "transposed", "expanded", "stepped"]))
    if way == "transposed" and x.ndim > 1:
        return x.transpose(0, -1)
    if way == "expanded" and x.ndim:
        dim = draw(st.integers(0, x.ndim - 1))
        return x.narrow(dim, 0, 1).expand_as(x) if x.shape[dim] else x
    if way == "stepped" and x.ndim and x.numel():
        return x.repeat_interleave(2, dim=-1)[..., ::2]
    return x


def valid_arguments(dtype: torch.dtype, device: str) -> dict[str, tuple[Callable[..., Any], list]]:
    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=dtype, device=device)

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    def packed(q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any) -> Any:
        return ops.attention(
            *(q, k, v), cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, causal=True
        )

    qkv = [ones(2, 3, 4, 16), ones(2, 4, 2, 16), ones(2, 4, 2, 16)]
    rows = [ones(4, 4, 16), ones(4, 2, 16)]
    return {
        "null": (ops.null, [ones(3, 4)]),
        "clip_loss": (ops.clip_loss, [ones(3, 4), ones(3, 4), ones(1).float()]),
        "siglip_loss": (ops.siglip_loss, [ones(3, 4), ones(3, 4), ones(1), ones(1)]),
        "attention": (ops.attention, qkv),
        "attention packed": (packed, [*rows, ones(4, 2, 16), ints(0, 1, 4), ints(0, 1, 4)]),
        "attention_decode": (ops.attention_decode, [*qkv, ints(3, 4)]),
        "rope": (ops.rope, [*rows, ints(0, 1, 2, 3)]),
        "mrope": (
            lambda q, k, position_ids: ops.mrope(q, k, position_ids, [2, 3, 3]),
            [*rows, ints(*range(12)).view(3, 4)],
        ),
        "vision_rope": (ops.vision_rope, [*rows, ints(*range(8)).view(2, 4)]),
        "rope_from_tables": (ops.rope_from_tables, [*rows, ones(4, 16), ones(4, 16)]),
        "vision_rope_qkv": (ops.vision_rope_qkv, [ones(4, 3, 2, 16), ints(*range(8)).view(2, 4)]),
        "qk_norm_rope": (ops.qk_norm_rope, [*rows, ones(16), ones(16), ints(0, 1, 2, 3)]),
        "qk_norm_rope_from_tables": (
            ops.qk_norm_rope_from_tables,
            [*rows, ones(16), ones(16), ones(4, 16), ones(4, 16)],
        ),
        **{name: (getattr(ops, name), [ones(3, 16)]) for name in ("quick_gelu", "gelu")},
        "swiglu": (ops.swiglu, [ones(3, 16), ones(3, 16)]),
        "swiglu fused": (ops.swiglu, [ones(3, 16)]),
        "geglu": (ops.geglu, [ones(3, 16), ones(3, 16)]),
        "rms_norm": (ops.rms_norm, [ones(3, 16), ones(16)]),
        "rms_norm residual": (
            lambda x, weight, residual: ops.rms_norm(x, weight, residual=residual),
            [ones(3, 16), ones(16), ones(3, 16)],
        ),
        "layer_norm": (ops.layer_norm, [ones(3, 16), ones(16), ones(16)]),
        "qformer_attention": (
            lambda q, x, weight_k, weight_v, bias_v, key_lengths: ops.qformer_attention(
                *(q, x, weight_k, weight_v, None, bias_v), key_lengths=key_lengths, form="absorbed"
            ),
            [ones(2, 3, 2, 8), ones(2, 4, 16), *[ones(16, 16)] * 2, ones(16), ints(4, 3)],
        ),
        "patch_embed rows": (ops.patch_embed, [ones(4, 16), ones(8, 16), ones(8), ones(4, 8)]),
        "patch_embed_pixels": (
            lambda images, weight, bias, pos_embed: ops.patch_embed_pixels(
                images, weight, bias, pos_embed, mean=[0.5], std=[0.5], merge_size=2
            ),
            [ones(2, 1, 8, 8), ones(8, 1, 4, 4), ones(8), ones(4, 8)],
        ),
        "patch_embed": (ops.patch_embed, [ones(2, 1, 8, 8), ones(8, 1, 4, 4), ones(8), ones(4, 8)]),
        "vq_lookup": (ops.vq_lookup, [ones(4, 16), ones(8, 16)]),
    }


CASES = sorted(valid_arguments(torch.float32, "cpu"))


@pytest.mark.parametrize("case", CASES)
def test_valid_arguments_are_valid(backend: Backend, case: str) -> None:
    for dtype in backend.dtypes:
        function, arguments = valid_arguments(dtype, backend.device)[case]
        function(*arguments)


@pytest.mark.parametrize("case", CASES)
def test_any_tensor_in_any_place(backend: Backend, case: str) -> None:
    function, arguments = valid_arguments(backend.dtypes[-1], backend.device)[case]

    @settings(
        max_examples=30 if backend.small else 100,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(place=st.integers(0, len(arguments) - 1), x=tensors())
    def check(place: int, x: torch.Tensor) -> None:
        changed = [x if i == place else a for i, a in enumerate(arguments)]
        with contextlib.suppress(ValueError, TypeError):
            got = function(*changed)
            expected = function(*[a.contiguous() for a in changed])
            torch.testing.assert_close(got, expected, atol=1e-2, rtol=2e-2, equal_nan=True)

    check()


@pytest.mark.parametrize("case", CASES)
def test_meta_tensors(case: str) -> None:
    """All of them: shapes. One of them beside real ones: no result that nobody wrote."""
    function, arguments = valid_arguments(torch.float32, "cpu")[case]
    for place in range(1, len(arguments)):
        mixed = [x.to("meta") if i == place else x for i, x in enumerate(arguments)]
        with pytest.raises((TypeError, ValueError), match="must be on the device of"):
            function(*mixed)


@pytest.mark.parametrize("case", CASES)
def test_an_error_names_function_and_argument(case: str) -> None:
    """Those that the caller wrote, whichever op computes it and whoever finds the error."""
    function, arguments = valid_arguments(torch.float32, "cpu")[case]
    names = inspect.signature(function).parameters
    for place, (name, x) in enumerate(zip(names, arguments, strict=False)):
        for wrong in (np.ones(3), "text", object(), x.to(torch.complex64), x.to_sparse()):
            changed = [*arguments[:place], wrong, *arguments[place + 1 :]]
            with pytest.raises((TypeError, ValueError), match=rf"^{case.split()[0]}: .*\b{name}\b"):
                function(*changed)


@pytest.mark.parametrize(
    ("case", "option", "wrong"),
    [
        ("attention", "causal", torch.ones(2)),
        ("attention", "softmax_scale", "text"),
        ("attention", "window_size", 3),
        ("attention", "window_size", ("a", "b")),
        ("attention_decode", "softcap", None),
        ("layer_norm", "eps", "text"),
        ("patch_embed_pixels", "merge_size", [2]),
        ("qk_norm_rope", "theta", torch.ones(2)),
        ("rope", "rotary_dim", [8]),
        ("rope", "theta", -1.0),
        ("vision_rope", "theta", float("nan")),
        ("vq_lookup", "metric", 3),
    ],
)
def test_an_error_names_the_option(case: str, option: str, wrong: object) -> None:
    arguments = valid_arguments(torch.float32, "cpu")[case][1]
    options = {"mean": [0.5], "std": [0.5]} if case == "patch_embed_pixels" else {}
    with pytest.raises((TypeError, ValueError), match=f"^{case}: .*{option}"):
        getattr(ops, case)(*arguments, **{**options, option: wrong})


@pytest.mark.parametrize("wrong", [None, 3, "text", [1.0, 2.0]], ids=repr)
@pytest.mark.parametrize("case", CASES)
def test_no_tensor_at_all(case: str, wrong: object) -> None:
    function, arguments = valid_arguments(torch.float32, "cpu")[case]
    with pytest.raises((TypeError, ValueError)):
        function(wrong, *arguments[1:])


FLAGS = [
    (name, flag.name)
    for name in ops.__all__
    for flag in inspect.signature(getattr(ops, name)).parameters.values()
    if flag.annotation is bool
]


@pytest.mark.parametrize(("name", "flag"), FLAGS)
def test_flags_are_bools(name: str, flag: str) -> None:
    """A truth value would do for the rest of the call: "false" is true."""
    for wrong in ("false", 1, None, torch.ones(2, 2)):
        with pytest.raises(TypeError, match=f"^{name}: {flag} must be a bool, got "):
            getattr(ops, name)(*[torch.ones(2, 2)] * 3, **{flag: wrong})


def test_numbers_are_numbers() -> None:
    q, positions = torch.ones(4, 2, 16), torch.arange(4)
    with pytest.raises(TypeError, match=r"^rope: theta must be of type float, got array"):
        ops.rope(q, q, positions, theta=np.ones(2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^layer_norm: eps must be of type float, got array"):
        ops.layer_norm(torch.ones(2, 16), torch.ones(16), eps=np.ones(2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^rope: theta must be below 2\^63, got 1180"):
        ops.rope(q, q, positions, theta=2**70)
    eighth = torch.ones(2, 4).to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match=r"^clip_loss: image_features must "):
        ops.clip_loss(eighth, eighth, 1.0)


def test_arguments_that_belong_together() -> None:
    k, cache, table = torch.ones(1, 1, 2, 16), torch.ones(1, 8, 2, 16), torch.ones(8, 8)
    with pytest.raises(ValueError, match=r"^kv_cache_append: cos must be given with sin"):
        ops.kv_cache_append(k, k, cache, cache, torch.ones(1, dtype=torch.int32), sin=table)
    images, weight = torch.ones(2, 3, 8, 8, dtype=torch.uint8), torch.ones(16, 3, 4, 4)
    how: dict[str, Any] = {"mean": [0.5] * 3, "std": [0.5] * 3}
    with pytest.raises(ValueError, match=r"^patch_embed_pixels: grid_thw must be None"):
        ops.patch_embed_pixels(images, weight, **how, grid_thw=torch.tensor(1))
    message = "weight must have as many dimensions as images"
    with pytest.raises(ValueError, match=message):
        ops.patch_embed_pixels(images[None], weight, **how)
