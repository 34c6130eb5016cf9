"""flash-attention's and torch's functions: their keywords, defaults, layouts and masks."""

import inspect

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.conftest import Backend
from tests.ops.attention_cases import cu_seqlens, eager
from vlmkernels.compat import flash_attn


def heads(backend: Backend, *shape: int) -> Tensor:
    return torch.randn(shape, device=backend.device).to(backend.dtypes[-1])


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a.float(), b.float(), rtol=1e-2, atol=1e-2)


def test_flash_attn_func(backend: Backend) -> None:
    q, k, v = (
        heads(backend, 2, 20, 4, 64),
        heads(backend, 2, 30, 2, 64),
        heads(backend, 2, 30, 2, 64),
    )
    close(flash_attn.flash_attn_func(q, k, v, causal=True), eager(q, k, v, True)[0])
    seen = torch.ones(20, 30, dtype=torch.bool, device=q.device).tril(10 + 3).triu(10 - 5)[None]
    found = flash_attn.flash_attn_func(q, k, v, 0.0, 0.3, window_size=(5, 3), softcap=7.0)
    close(found, eager(q, k, v, softmax_scale=0.3, mask=seen, softcap=7.0)[0])


def test_flash_attn_varlen_func(backend: Backend) -> None:
    q, k, v = (heads(backend, 30, h, 64) for h in (4, 2, 2))
    cu = cu_seqlens([20, 10], backend.device)
    found = flash_attn.flash_attn_varlen_func(q, k, v, cu, cu, 20, 20, causal=True)
    for part in (slice(20), slice(20, None)):
        close(found[part], eager(q[None, part], k[None, part], v[None, part], True)[0][0])


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (seqlen, num_heads, head_dim) at the positions of the rows of cos and sin."""
    dim, y = 2 * cos.shape[-1], x.float().clone()
    cos, sin = cos.float()[:, None], sin.float()[:, None]
    first = slice(0, dim, 2) if interleaved else slice(dim // 2)
    second = slice(1, dim, 2) if interleaved else slice(dim // 2, dim)
    a, b = x[..., first].float(), x[..., second].float()
    y[..., first], y[..., second] = a * cos - b * sin, a * sin + b * cos
    return y.to(x.dtype)


@pytest.mark.parametrize("paged", [False, True], ids=["rows", "pages"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
def test_flash_attn_with_kvcache(backend: Backend, interleaved: bool, paged: bool) -> None:
    """Appends, rotates and attends; everything that must not be read is NaN."""
    lengths, new, page = [37, 0, 20], 3, 16
    q, k, v = (heads(backend, 3, new, h, 64) for h in (4, 2, 2))
    caches = [torch.full((3, 48, 2, 64), torch.nan, dtype=q.dtype, device=q.device) for _ in "kv"]
    for cache in caches:
        for row, n in enumerate(lengths):
            cache[row, :n] = torch.randn(n, 2, 64)
    table = torch.randperm(9, device=q.device).int().view(3, 3)
    stored = [x.clone() for x in caches]
    if paged:
        for x, cache in zip(stored, caches, strict=True):
            x.view(9, page, 2, 64)[table.flatten().long()] = cache.view(9, page, 2, 64)
        stored = [x.view(9, page, 2, 64) for x in stored]
    angles = torch.rand(48, 16, device=q.device) * 6
    cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)
    found = flash_attn.flash_attn_with_kvcache(
        q, *stored, k, v, cos, sin, torch.tensor(lengths, dtype=torch.int32, device=q.device),
        causal=True, window_size=(25, -1), rotary_interleaved=interleaved,
        block_table=table if paged else None,
    )  # fmt: skip
    assert isinstance(found, Tensor)
    for row, n in enumerate(lengths):
        at = slice(n, n + new)
        caches[0][row, at] = rotated(k[row], cos[at], sin[at], interleaved)
        caches[1][row, at] = v[row]
        seen = torch.ones(new, n + new, dtype=torch.bool, device=q.device).tril(n).triu(n - 25)
        queries = rotated(q[row], cos[at], sin[at], interleaved)[None]
        wanted, _ = eager(queries, *(x[row : row + 1, : n + new] for x in caches), mask=seen[None])
        close(found[row], wanted[0])
        for x, cache in zip(stored, caches, strict=True):
            mine = x[table[row].long()].flatten(0, 1) if paged else x[row]
            torch.testing.assert_close(mine, cache[row], rtol=0, atol=1e-2, equal_nan=True)


def test_kvcache_without_new_keys(backend: Backend) -> None:
    q, k, v = (
        heads(backend, 2, 1, 4, 64),
        heads(backend, 2, 24, 2, 64),
        heads(backend, 2, 24, 2, 64),
    )
    out, lse = flash_attn.flash_attn_with_kvcache(q, k, v, return_softmax_lse=True)
    wanted, wanted_lse = eager(q, k, v)
    close(out, wanted)
    close(lse, wanted_lse)
    found = flash_attn.flash_attn_with_kvcache(q, k, v, cache_seqlens=7)
    close(found, eager(q, k[:, :7], v[:, :7])[0])


@pytest.mark.parametrize("lengths", [(20, 20), (20, 30), (30, 20)], ids=str)
def test_sdpa_causal(backend: Backend, lengths: tuple[int, int]) -> None:
    """Top-left, whatever the lengths."""
    q, k, v = (
        heads(backend, 2, h, n, 64) for h, n in zip((4, 2, 2), (*lengths, lengths[1]), strict=True)
    )
    options = {"is_causal": True, "enable_gqa": True, "scale": 0.2}
    found = flash_attn.scaled_dot_product_attention(q, k, v, **options)
    close(found, functional.scaled_dot_product_attention(q, k, v, **options))


def test_sdpa_mask(backend: Backend) -> None:
    q, k, v = (
        heads(backend, 2, 4, 20, 64),
        heads(backend, 2, 4, 30, 64),
        heads(backend, 2, 4, 30, 64),
    )
    bool_mask = torch.rand(2, 1, 1, 30, device=q.device) < 0.7
    for mask in (
        bool_mask,
        heads(backend, 20, 30),
        heads(backend, 4, 20, 30),
        heads(backend, 2, 1, 20, 30),
    ):
        results = []
        for function in (
            flash_attn.scaled_dot_product_attention, functional.scaled_dot_product_attention
        ):  # fmt: skip
            leaf = mask.clone().requires_grad_(mask.is_floating_point())
            out = function(q, k, v, leaf)
            results.append([out])
            if leaf.requires_grad:
                results[-1] += torch.autograd.grad(out.float().square().sum(), leaf)
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a.float(), b.float(), rtol=3e-2, atol=3e-2)


def test_torch_signature() -> None:
    """Keyword by keyword and default by default, as torch documents it."""
    ours = inspect.signature(flash_attn.scaled_dot_product_attention).parameters
    assert {name: p.default for name, p in ours.items() if p.default is not p.empty} == {
        "attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False
    }  # fmt: skip
    assert list(ours)[:3] == ["query", "key", "value"]


def test_what_is_refused(backend: Backend) -> None:
    x = heads(backend, 1, 4, 2, 64)
    lengths = torch.tensor([4], dtype=torch.int32, device=x.device)
    slopes = torch.ones(2, device=x.device)
    for function, arguments, message in [
        (flash_attn.flash_attn_func, {"dropout_p": 0.1}, "dropout_p is not supported"),
        (flash_attn.flash_attn_func, {"alibi_slopes": slopes}, r"ops.attention\(bias=...\)"),
        (flash_attn.flash_attn_func, {"return_attn_probs": True}, "return_lse=True"),
        (flash_attn.flash_attn_with_kvcache, {"cache_batch_idx": lengths}, "cache_batch_idx"),
        (flash_attn.flash_attn_with_kvcache, {"cache_leftpad": lengths}, "cache_leftpad is not"),
        (flash_attn.flash_attn_with_kvcache, {"rotary_cos": x}, "rotary_cos is not supported"),
        (flash_attn.scaled_dot_product_attention, {"dropout_p": 0.1}, "dropout_p is not"),
        (flash_attn.scaled_dot_product_attention, {"attn_mask": x, "is_causal": True}, "None"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            function(x, x, x, **arguments)
    with pytest.raises(ValueError, match="unless enable_gqa=True, got 2"):
        flash_attn.scaled_dot_product_attention(heads(backend, 1, 4, 2, 64), x[:, :2], x[:, :2])


def test_flags_and_types() -> None:
    """Errors name the function that was called; a flag that is no bool is refused."""
    q = torch.ones(1, 4, 2, 16)
    with pytest.raises(TypeError, match=r"^flash_attn_func: causal must be a bool, got 'no'"):
        flash_attn.flash_attn_func(q, q, q, causal="no")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^scaled_dot_product_attention: is_causal must be a bool"):
        flash_attn.scaled_dot_product_attention(q, q, q, is_causal=1)  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=r"^scaled_dot_product_attention: query must be a torch.Ten"
    ):
        flash_attn.scaled_dot_product_attention(q.tolist(), q, q)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^flash_attn_func: k must "):
        flash_attn.flash_attn_func(q, q[..., :8], q)
