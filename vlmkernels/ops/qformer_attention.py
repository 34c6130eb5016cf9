"""qformer_attention: a few queries attend to image tokens, the K and V projections included."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from vlmkernels import _core
from vlmkernels.ops import _library
from vlmkernels.ops.attention import attention

FORMS = ("auto", "absorbed", "projected")
# What backward may allocate for a part of the batch; one image's may be more.
_WORKSPACE_BYTES = {"cpu": 8 << 20, "cuda": 64 << 20}
# On the CPU the absorbed form's narrow products run at a fraction of the rate of the projections.
_CPU_MARGIN = {torch.bfloat16: 6.0}
_CPU_MARGIN_ELSE = 2.0


@_library.public
def qformer_attention(
    q: Tensor,
    x: Tensor,
    weight_k: Tensor,
    weight_v: Tensor,
    bias_k: Tensor | None = None,
    bias_v: Tensor | None = None,
    *,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    key_pos: Tensor | None = None,
    softmax_scale: float | None = None,
    form: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """out_h = softmax(softmax_scale q_h k_h^T) v_h, k = (x + key_pos) weight_k^T + bias_k and
    v = x weight_v^T + bias_v;  lse = log sum exp(softmax_scale q_h k_h^T).

    The absorbed form multiplies in another order, and never forms k and v: with q'_h = q_h
    weight_k,h it is softmax(softmax_scale q'_h x^T) x weight_v,h^T + bias_v (bias_k adds the same
    to all scores of a row, and cancels). On CUDA the forward is one kernel that keeps q' and the
    sums over x on the chip. It is the cheaper form while queries are few: `cheaper_form`, with a
    margin on the CPU.

    Args:
        q: (batch, num_queries, num_heads, head_dim), already projected; batch may be 1 for queries
            that all images share.
        x: (batch, num_tokens, width), the image tokens.
        weight_k, weight_v: (num_heads * head_dim, width), as of torch.nn.Linear.
        bias_k, bias_v: (num_heads * head_dim,).
        key_lengths: int32 (batch,): image b has the tokens 0 to key_lengths[b], and no other is
            read in the absorbed form. Checked on the CPU, clamped on CUDA. An image without tokens
            gives out 0 and lse -inf, and passes no gradient.
        key_mask: bool (batch, num_tokens), True where a token exists, anywhere; costs a copy of x.
        key_pos: (num_tokens, width), positions that keys have and values have not; projected form.
        softmax_scale: positive; 1 / sqrt(head_dim) by default.
        form: "auto", "absorbed" or "projected".
        return_lse: return (out, lse).

    Returns:
        out (batch, num_queries, num_heads, head_dim); lse (batch, num_heads, num_queries) in
        float32 (float64 for float64), differentiable. 16-bit dtypes accumulate in float32. The
        gradient is deterministic. Under autocast floating arguments are cast first.

    Raises:
        ValueError: shapes that do not fit together, lengths out of range, both key_lengths and
            key_mask, an unknown form, key_pos in the absorbed form.
        TypeError: dtypes or devices that differ, x isn't floating point.

    Source: Li et al., "BLIP-2", 2023, section 3.1; the order of products is that of DeepSeek-V2's
    absorbed projections (arXiv 2405.04434, section 2.1.2).
    """
    q, x, weight_k, weight_v, bias_k, bias_v, key_pos = _library.autocast(
        q, x, weight_k, weight_v, bias_k, bias_v, key_pos
    )
    scale = max(q.shape[-1], 1) ** -0.5 if softmax_scale is None else softmax_scale
    tensors = (q, x, weight_k, weight_v, bias_k, bias_v)
    if _library._is_plain(tensors):
        _core.C.qformer_attention_check(*tensors, key_lengths, scale)
    _check_key_pos(key_pos, x)
    if key_mask is not None:
        x, key_pos, key_lengths = _compact(x, key_pos, key_mask, key_lengths)
    if _form(form, q, x, key_pos) == "projected":
        out, lse = _projected(*tensors[:1], x, *tensors[2:], key_lengths, key_pos, scale)
    else:
        out, lse = _op(*tensors[:1], x, *tensors[2:], key_lengths, scale)
        if return_lse and bias_k is not None:
            shift = scale * _dot(q, bias_k.unflatten(0, q.shape[2:]))
            lse = lse + shift.where(lse != -torch.inf, 0)
    return (out, lse) if return_lse else out


def flops(
    form: str, num_queries: int, num_tokens: int, num_heads: int, head_dim: int, width: int
) -> int:
    """Multiplications and additions of one image's forward in the absorbed or projected form.

    absorbed:  2 rows width (2 head_dim + 2 num_tokens), rows = num_heads num_queries:
               q weight_k and y weight_v^T, q' x^T and p x.
    projected: 2 num_heads head_dim (2 num_tokens width + 2 num_queries num_tokens):
               k and v, q k^T and p v.
    """
    if form == "absorbed":
        return 4 * num_heads * num_queries * width * (head_dim + num_tokens)
    return 4 * num_heads * head_dim * num_tokens * (width + num_queries)


def cheaper_form(
    num_queries: int,
    num_tokens: int,
    num_heads: int,
    head_dim: int,
    width: int,
    *,
    margin: float = 1,
) -> str:
    """ "absorbed" or "projected", whichever has fewer `flops`: for many tokens, absorbed when
    there are fewer queries than head_dim. margin: by what absorbed must be ahead."""
    sizes = (num_queries, num_tokens, num_heads, head_dim, width)
    ahead = flops("absorbed", *sizes) * margin < flops("projected", *sizes)
    return "absorbed" if ahead else "projected"


def reference(
    q: Tensor,
    x: Tensor,
    weight_k: Tensor,
    weight_v: Tensor,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    key_lengths: Tensor | None,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    # Autocast would make halves of the sums that dtype is for.
    with torch.autocast(x.device.type, enabled=False):
        dtype = _lse_dtype(x)
        exists = _exists(x, key_lengths)
        x, q_heads = x.where(exists[..., None], 0).to(dtype), q.transpose(1, 2).to(dtype)
        k, v = (
            linear(x, weight.to(dtype)).unflatten(-1, q.shape[2:]).transpose(1, 2)
            for weight in (weight_k, weight_v)
        )
        scores = (q_heads @ k.mT * softmax_scale).masked_fill(~exists[:, None, None], -torch.inf)
        lse = scores.logsumexp(-1) if x.shape[1] else scores.sum(-1) - torch.inf
        p = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None])
        out = (p @ v).transpose(1, 2)
        if bias_v is not None:
            some = exists.any(1)[:, None, None, None]
            out = out + some * bias_v.to(dtype).unflatten(0, q.shape[2:])
        return out.to(q.dtype).contiguous(), lse


def _form(form: str, q: Tensor, x: Tensor, key_pos: Tensor | None) -> str:
    if form not in FORMS:
        raise ValueError(f"qformer_attention: form must be one of {', '.join(FORMS)}, got {form!r}")
    if form == "absorbed" and key_pos is not None:
        raise ValueError("qformer_attention: key_pos needs form 'projected', got 'absorbed'")
    if form != "auto":
        return form
    if key_pos is not None:
        return "projected"
    if q.shape[3] % 8 or q.shape[3] > 256:  # which attention refuses
        return "absorbed"
    on_cpu = x.device.type == "cpu" and not _core.emulating
    margin = _CPU_MARGIN.get(x.dtype, _CPU_MARGIN_ELSE) if on_cpu else 1
    return cheaper_form(q.shape[1], x.shape[1], q.shape[2], q.shape[3], x.shape[2], margin=margin)


def _check_key_pos(key_pos: Tensor | None, x: Tensor) -> None:
    if key_pos is None or key_pos.shape in (x.shape, x.shape[1:], (1, *x.shape[1:])):
        return
    raise ValueError(
        "qformer_attention: key_pos must have shape (num_tokens, width) or that of x "
        f"{tuple(x.shape)}, got {tuple(key_pos.shape)}"
    )


def _compact(
    x: Tensor, key_pos: Tensor | None, key_mask: Tensor, key_lengths: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The tokens that exist come first, in their order; so does key_pos, per image then."""
    if key_lengths is not None:
        raise ValueError("qformer_attention: give key_lengths or key_mask, got both")
    if key_mask.dtype != torch.bool:
        raise TypeError(f"qformer_attention: key_mask must be bool, got {key_mask.dtype}")
    if key_mask.shape != x.shape[:2]:
        raise ValueError(
            f"qformer_attention: key_mask must have shape (batch, num_tokens) = "
            f"{tuple(x.shape[:2])}, got {tuple(key_mask.shape)}"
        )
    order = (~key_mask).to(torch.uint8).argsort(dim=1, stable=True)[..., None].expand(x.shape)
    lengths = key_mask.sum(1, dtype=torch.int32)
    if key_pos is not None:
        key_pos = key_pos.expand(x.shape).gather(1, order)
    return x.gather(1, order), key_pos, lengths


def _projected(
    q: Tensor,
    x: Tensor,
    weight_k: Tensor,
    weight_v: Tensor,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    key_lengths: Tensor | None,
    key_pos: Tensor | None,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    batch, num_tokens, _ = x.shape
    num_queries, *heads = q.shape[1:]
    if key_lengths is not None:  # no NaN of the padding may reach the gradients of the weights
        x = x.where(_exists(x, key_lengths)[..., None], 0)
    k = linear(x if key_pos is None else x + key_pos, weight_k, bias_k).unflatten(-1, heads)
    v = linear(x, weight_v, bias_v).unflatten(-1, heads)
    q = q.expand(batch, -1, -1, -1)
    if key_lengths is None:
        out = attention(q, k, v, softmax_scale=softmax_scale, return_lse=True)
        return cast(tuple[Tensor, Tensor], out)
    # Packed, each image as two sequences: its tokens with the queries, its padding with none.
    images = torch.arange(batch + 1, dtype=torch.int32, device=x.device)
    zero = images[:1]
    ends_k = torch.stack([images[:-1] * num_tokens + key_lengths, images[1:] * num_tokens], 1)
    ends_q = (images[1:] * num_queries).repeat_interleave(2)
    packed = cast(
        tuple[Tensor, Tensor],
        attention(
            q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), softmax_scale=softmax_scale,
            cu_seqlens_q=torch.cat([zero, ends_q]), max_seqlen_q=num_queries,
            cu_seqlens_k=torch.cat([zero, ends_k.flatten()]), max_seqlen_k=num_tokens,
            return_lse=True,
        ),
    )  # fmt: skip
    out, lse = packed[0].view(q.shape), packed[1].unflatten(1, (batch, num_queries))
    return out, lse.transpose(0, 1).contiguous()


def _lse_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _exists(x: Tensor, key_lengths: Tensor | None) -> Tensor:
    """(batch, num_tokens), True where there is a token."""
    if key_lengths is None:
        return x.new_ones(x.shape[:2], dtype=torch.bool)
    return torch.arange(x.shape[1], device=x.device) < key_lengths[:, None]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """(batch, num_heads, num_queries), the sum of a b over head_dim."""
    dtype = _lse_dtype(a)
    return (a.to(dtype) * b.to(dtype)).sum(-1).transpose(1, 2).contiguous()


def _dense(x: Tensor) -> Tensor:
    return x if x.ndim == 0 or x.stride(-1) == 1 else x.contiguous()


def _fake(q: Tensor, x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], *q.shape[1:])
    return q.new_empty(shape), q.new_empty((shape[0], shape[2], shape[1]), dtype=_lse_dtype(x))


def _kernel(
    q: Tensor,
    x: Tensor,
    weight_k: Tensor,
    weight_v: Tensor,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    key_lengths: Tensor | None,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    q, x, weight_k, weight_v = (
        q.contiguous(),
        _dense(x),
        weight_k.contiguous(),
        weight_v.contiguous(),
    )
    out, lse = _fake(q, x)
    if not _core.C.qformer_attention(
        q, x, weight_k, weight_v, bias_k, bias_v, key_lengths, softmax_scale, out, lse
    ):
        _absorbed(q, x, weight_k, weight_v, bias_v, key_lengths, softmax_scale, out, lse)
    return out, lse


def _absorbed(
    q: Tensor, x: Tensor, weight_k: Tensor, weight_v: Tensor, bias_v: Tensor | None,
    key_lengths: Tensor | None, softmax_scale: float, out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    """By PyTorch's matrix products, image by image: what belongs to one stays in cache."""
    heads, width = q.shape[2:], x.shape[2]
    rows = q.new_empty((heads[0], q.shape[1], width))
    for i, num_keys in enumerate(_lengths(x, key_lengths)):
        if num_keys == 0:
            out[i], lse[i] = 0, -torch.inf
            continue
        tokens = x[i, :num_keys]
        if i == 0 or q.shape[0] > 1:
            torch.bmm(q[i].transpose(0, 1), weight_k.view(*heads, width), out=rows)
        scores = (rows.flatten(0, 1) @ tokens.t()).to(lse.dtype).mul_(softmax_scale)
        lse[i] = scores.logsumexp(-1).view_as(lse[i])
        p = scores.sub_(lse[i].view(-1, 1)).exp_().to(x.dtype)
        y = (p @ tokens).view_as(rows)
        out[i] = torch.bmm(y, weight_v.view(*heads, width).mT).transpose(0, 1)
        if bias_v is not None:
            out[i] += bias_v.view(heads)


def _lengths(x: Tensor, key_lengths: Tensor | None) -> list[int]:
    if key_lengths is None:
        return [x.shape[1]] * x.shape[0]
    return cast(list[int], key_lengths.clamp(0, x.shape[1]).tolist())


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.softmax_scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, x, weight_k, weight_v, bias_k, bias_v, key_lengths, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    delta = _dot(
        dout, out if bias_v is None else out - bias_v.unflatten(0, q.shape[2:])
    )  # sum p dp
    dq, dx, dweight_k, dweight_v = _backward_op(
        dout, dlse, delta, q, x, weight_k, weight_v, key_lengths, lse, ctx.softmax_scale,
        ctx.needs_input_grad[1],
    )  # fmt: skip
    dbias_k = None if bias_k is None else torch.zeros_like(bias_k)
    dbias_v = None
    if bias_v is not None:
        some = _exists(x, key_lengths).any(1)[:, None, None, None]
        dbias_v = dout.where(some, 0).sum((0, 1)).flatten()
    dx = dx if ctx.needs_input_grad[1] else None
    return dq, dx, dweight_k, dweight_v, dbias_k, dbias_v, None, None


def _backward_fake(
    dout: Tensor, dlse: Tensor | None, delta: Tensor, q: Tensor, x: Tensor, weight_k: Tensor,
    weight_v: Tensor, key_lengths: Tensor | None, lse: Tensor, softmax_scale: float, need_dx: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx = x.new_empty(x.shape if need_dx else 0)
    dweight_k, dweight_v = _library.empty(weight_k), _library.empty(weight_v)
    return _library.empty(q), dx, dweight_k, dweight_v


def _backward_kernel(
    dout: Tensor, dlse: Tensor | None, delta: Tensor, q: Tensor, x: Tensor, weight_k: Tensor,
    weight_v: Tensor, key_lengths: Tensor | None, lse: Tensor, softmax_scale: float, need_dx: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """With the stacks rows = [dy; q'] and [p; ds] of each image:
    [y; dq'] = [p; ds] x and dx = [p; ds]^T [dy; q']."""
    _, num_queries, *heads = q.shape
    x, dlse = _dense(x), torch.zeros_like(lse) if dlse is None else dlse
    dx = x.new_empty(x.shape) if need_dx else None
    dq = q.new_zeros(q.shape, dtype=_lse_dtype(q) if q.shape[0] < x.shape[0] else q.dtype)
    weights = [weight.reshape(*heads, x.shape[2]) for weight in (weight_v, weight_k)]
    sums = [w.new_zeros(w.shape, dtype=_lse_dtype(w)) for w in weights]
    for images in _parts(q, x):
        now = x[images]
        # (num_heads, images * num_queries, head_dim): a head is one product over all images.
        left = [_by_head(t) for t in (dout[images], _shared(q, images, now))]
        rows = now.new_empty((2, *left[0].shape[:2], now.shape[2]))
        for i in range(2):
            torch.bmm(left[i], weights[i], out=rows[i])
        lengths = None if key_lengths is None else key_lengths[images]
        drows = _products(
            rows, now, lengths, lse[images], dlse[images], delta[images], softmax_scale,
            None if dx is None else dx[images],
        )  # fmt: skip
        for i in range(2):
            sums[i] += torch.bmm(left[i].mT, drows[i])
        part = torch.bmm(drows[1], weights[1].mT).unflatten(1, (len(now), num_queries))
        part = part.permute(1, 2, 0, 3)
        if q.shape[0] < x.shape[0]:
            dq += part.sum(0, keepdim=True, dtype=dq.dtype)
        else:
            dq[images] = part
    dweight_v, dweight_k = (s.to(q.dtype).view(weight_k.shape) for s in sums)
    return dq.to(q.dtype), x.new_empty(0) if dx is None else dx, dweight_k, dweight_v


def _parts(q: Tensor, x: Tensor) -> Iterator[slice]:
    """Parts of the batch for which backward's workspace stays small."""
    batch, num_tokens, width = x.shape
    rows = q.shape[1] * q.shape[2]
    each = max(1, rows * (4 * width + 2 * num_tokens) * x.itemsize)
    count = max(1, _WORKSPACE_BYTES[x.device.type] // each)
    return (slice(i, min(i + count, batch)) for i in range(0, batch, count))


def _shared(q: Tensor, images: slice, x: Tensor) -> Tensor:
    return q[images] if q.shape[0] > 1 else q.expand(x.shape[0], -1, -1, -1)


def _by_head(t: Tensor) -> Tensor:
    return t.permute(2, 0, 1, 3).flatten(1, 2).contiguous()


def _products(
    rows: Tensor, x: Tensor, key_lengths: Tensor | None, lse: Tensor, dlse: Tensor, delta: Tensor,
    softmax_scale: float, dx: Tensor | None,
) -> Tensor:  # fmt: skip
    """[y; dq'], and dx in place."""
    batch, num_tokens, width = x.shape
    drows = torch.empty_like(rows)
    columns = (num_tokens + 7) // 8 * 8
    stack = lse.shape[1] * lse.shape[2]
    probabilities = x.new_empty((batch, 2, stack, columns))
    if _core.C.qformer_attention_backward(
        rows, x, key_lengths, lse, delta - dlse, softmax_scale, probabilities, drows, dx
    ):
        return drows
    each, deach = (t.unflatten(2, (batch, lse.shape[2])) for t in (rows, drows))
    for i, num_keys in enumerate(_lengths(x, key_lengths)):
        tokens, both = x[i, :num_keys], each[:, :, i].reshape(2 * stack, width)
        dp, scores = (both @ tokens.t()).to(lse.dtype).view(2, stack, num_keys)
        p = scores.mul_(softmax_scale).sub_(lse[i].view(-1, 1)).exp_()
        dp += dlse[i].reshape(-1, 1) - (p * dp).sum(-1, keepdim=True)  # closer than delta
        ds = dp.mul_(p).mul_(softmax_scale)
        weights = torch.cat([p, ds]).to(x.dtype)
        deach[:, :, i] = (weights @ tokens).view_as(deach[:, :, i])
        if dx is not None:
            torch.mm(weights.t(), both, out=dx[i, :num_keys])
            dx[i, num_keys:] = 0
    return drows


_INPUTS = "Tensor q, Tensor x, Tensor weight_k, Tensor weight_v"
_op = _library.define(
    f"qformer_attention({_INPUTS}, Tensor? bias_k, Tensor? bias_v, Tensor? key_lengths, "
    "float softmax_scale) -> (Tensor, Tensor)",
    kernel=_kernel,
    fake=_fake,
    reference=reference,
    setup_context=_setup_context,
    backward=_backward,
    cpu="its own matrix products",
)
_backward_op = _library.define(
    f"qformer_attention_backward(Tensor dout, Tensor? dlse, Tensor delta, {_INPUTS}, "
    "Tensor? key_lengths, Tensor lse, float softmax_scale, bool need_dx) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    kernel=_backward_kernel,
    fake=_backward_fake,
    reference=_backward_kernel,
    cpu="its own matrix products",
)
