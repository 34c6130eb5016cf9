"""Rivals: found when importable, right where they run, silent about nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import rivals
from bench.case import Case, forward, tensors
from bench.measure import relative_error
from bench.rivals import NotSupportedError, Rival
from vlmkernels import ops
from vlmkernels.testing import reference_ops


def rand(*shape: int) -> Tensor:
    return torch.randn(shape)


def inputs_of(function: str) -> list[dict[str, Any]]:
    q, k = rand(2, 24, 4, 32), rand(2, 24, 2, 32)
    packed = {"q": q[0], "k": k[0], "v": k[0].flip(0)}
    packed |= {"cu_seqlens_q": torch.tensor([0, 9, 24], dtype=torch.int32), "max_seqlen_q": 15}
    positions = torch.arange(24).repeat(3, 1) * torch.tensor([[1], [2], [3]])
    rotary = {"q": q[0], "k": k[0]}
    weights = {"q_weight": rand(32), "k_weight": rand(32)}
    table = rand(24, 16).repeat(1, 2)
    x, w = rand(6, 64), rand(64)
    cache = {"k_cache": k, "v_cache": k.flip(1)}
    seqlens = torch.tensor([20, 7], dtype=torch.int32)
    kv = {"weight_k": rand(16, 24), "weight_v": rand(16, 24)}
    features = {"image_features": x[:, :32] / 8, "text_features": x[:, 32:] / 8}
    pixels = {"images": torch.randint(0, 256, (2, 3, 28, 56), dtype=torch.uint8), "bias": rand(8)}
    pixels |= {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    return {
        "attention": [{"q": q, "k": k, "v": k.flip(1), "causal": True}, packed],
        "attention_decode": [{"q": q[:, :2], **cache, "cache_seqlens": seqlens}],
        "rope": [{**rotary, "position_ids": positions[1]}],
        "mrope": [
            {**rotary, "position_ids": positions, "sections": (4, 6, 6)},
            {**rotary, "position_ids": positions, "sections": (6, 5, 5), "interleaved": True},
        ],
        "vision_rope": [{**rotary, "position_ids": positions[1:]}],
        "vision_rope_qkv": [{"qkv": rand(24, 3, 4, 32), "position_ids": positions[1:]}],
        "qk_norm_rope": [
            {**rotary, **weights, "position_ids": positions[1]},
            {**rotary, **weights, "position_ids": positions, "sections": (6, 5, 5)},
        ],
        "qk_norm_rope_from_tables": [{**rotary, **weights, "cos": table, "sin": table.flip(0)}],
        "quick_gelu": [{"x": x}],
        "gelu": [{"x": x}, {"x": x, "approximate": "tanh"}],
        "swiglu": [{"gate": x, "up": x.flip(0)}, {"gate": x}],
        "geglu": [{"gate": x, "up": x.flip(0)}, {"gate": x}],
        "rms_norm": [{"x": x, "weight": w}, {"x": x, "weight": w, "residual": rand(6, 64)}],
        "layer_norm": [{"x": x, "weight": w, "bias": rand(64), "residual": rand(6, 64)}],
        "patch_embed": [
            {"x": rand(2, 3, 28, 42), "weight": rand(8, 3, 14, 14), "bias": rand(8)},
            {"x": rand(5, 24), "weight": rand(8, 3, 2, 2, 2), "pos_embed": rand(5, 8)},
            {"x": rand(1, 3, 4, 6, 6), "weight": rand(8, 3, 2, 2, 2)},
        ],
        "vq_lookup": [
            {"z": x, "codebook": rand(9, 64)},
            {"z": x, "codebook": rand(9, 64), "metric": "cosine"},
        ],
        "qformer_attention": [
            {"q": rand(2, 3, 2, 8), "x": rand(2, 9, 24), **kv},
            {"q": rand(1, 3, 2, 8), "x": rand(2, 9, 24), **kv, "bias_k": w[:16], "bias_v": w[:16]},
        ],
        "clip_loss": [{**features, "logit_scale": torch.tensor(10.0)}],
        "siglip_loss": [
            {**features, "logit_scale": torch.tensor(5.0), "logit_bias": torch.tensor(-4.0)}
        ],
        "patch_embed_pixels": [
            {**pixels, "weight": rand(8, 3, 14, 14)},
            {**pixels, "weight": rand(8, 3, 2, 14, 14), "merge_size": 2},
        ],
    }[function]


# FlexAttention compiles for half a minute on a CPU; what its masks mean is tested below.
HERE = [
    r for r in rivals.available("cpu") if r.function != rivals.ANY and r.name != "FlexAttention"
]


@pytest.mark.parametrize("rival", HERE, ids=lambda r: f"{r.function}-{r.name}")
def test_a_rival_computes_what_the_op_does(rival: Rival) -> None:
    ran = 0
    for inputs in inputs_of(rival.function):
        with reference_ops():
            expected = tensors(getattr(ops, rival.function)(**inputs))
        try:
            result = tensors(rival.call(**inputs))
        except NotSupportedError:
            continue
        assert relative_error(result, expected) < 1e-5
        ran += 1
    assert ran


def test_flex_masks_mean_what_attention_means() -> None:
    from bench.rivals import attention

    cu_seqlens = torch.tensor([0, 9, 24, 24, 40], dtype=torch.int32)
    lengths = cu_seqlens.diff().long()
    document = torch.arange(4).repeat_interleave(lengths)
    same = document[:, None] == document
    for causal in (False, True):
        mask = attention._block_mask(causal, (40, 40), cu_seqlens, "cpu").mask_mod
        i, j = torch.meshgrid(torch.arange(40), torch.arange(40), indexing="ij")
        seen = mask(torch.tensor(0), torch.tensor(0), i, j)
        assert torch.equal(seen, same & (i >= j) if causal else same)
    mask = attention._block_mask(True, (2, 5), None, "cpu").mask_mod
    i, j = torch.meshgrid(torch.arange(2), torch.arange(5), indexing="ij")
    assert torch.equal(mask(None, None, i, j), j <= i + 3)


def test_only_what_can_be_imported_and_run_here() -> None:
    names = {r.name for r in rivals.available("cpu")}
    assert {"SDPA flash", "SDPA math", "F.rms_norm", "torch.compile"} <= names
    assert "SDPA cuDNN" not in names
    assert "SDPA cuDNN" in {r.name for r in rivals.available("cuda")}
    monkey = Rival("nobody", "rms_norm", "no_such_module.at_all", lambda: None)
    rivals.REGISTRY.append(monkey)
    assert monkey not in rivals.available("cpu")
    rivals.REGISTRY.remove(monkey)


def fake_case(direction: str, inputs: dict[str, Any], eager: Callable[..., Any] | None) -> Case:
    variants = {"vlmkernels": forward(ops.null, inputs), "eager": forward(ops.null, inputs)}
    text = {"op": "null", "shape": "s", "dtype": "float32", "direction": direction}
    fields = {"function": "null", "inputs": inputs, "eager": eager}
    return Case(**text, bytes=1, flops=0, variants=variants, **fields)


def test_rivals_join_cases_of_their_function_in_both_directions() -> None:
    calls = []

    def twice(x: Tensor) -> Tensor:
        calls.append(x.requires_grad)
        return 2 * x

    fakes = [Rival("fake", "null", "torch", twice), Rival("other", "rope", "torch", twice)]
    inputs = {"x": torch.ones(3, requires_grad=True)}
    found = rivals.variants(fake_case("fwd", inputs, None), fakes)
    assert set(found) == {"fake"} and calls == []  # nothing runs before it is asked to
    assert torch.equal(found["fake"](), torch.full((3,), 2.0)) and calls == [False]
    backward = rivals.variants(fake_case("bwd", inputs, None), fakes)["fake"]
    dy = torch.randn(3, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    assert torch.equal(backward()[0], 2 * dy) and torch.equal(backward()[0], 2 * dy)
    assert calls == [False, True]


def test_torch_compile_of_the_eager_code_joins() -> None:
    anything = [r for r in rivals.available("cpu") if r.function == rivals.ANY]
    inputs = {"x": torch.ones(3)}
    assert rivals.variants(fake_case("fwd", inputs, None), anything) == {}
    assert set(rivals.variants(fake_case("fwd", inputs, torch.clone), anything)) == {
        "torch.compile"
    }
