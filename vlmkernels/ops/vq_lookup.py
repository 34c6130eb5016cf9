"""vq_lookup: the nearest code of each token, exactly, and the gradients of VQ-VAE training."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlmkernels import _core
from vlmkernels.ops import _library

LARGEST = 2.0**50  # of a valid element (kVqLargest in vq_lookup.h)
SHORTEST = 2.0**-50  # of a vector that has a direction (kVqShortest)


class VQLookup(NamedTuple):
    """What `vq_lookup` gives. The two distances are the same numbers with different gradients."""

    indices: Tensor  # (num_tokens,) int64
    quantized: Tensor  # (num_tokens, dim)
    distance: Tensor  # (num_tokens,); its gradient goes to z
    codebook_distance: Tensor  # (num_tokens,); its gradient goes to the codebook


@_library.public
def vq_lookup(
    z: Tensor, codebook: Tensor, *, metric: str = "euclidean", straight_through: bool = True
) -> VQLookup:
    """indices[i] = argmin_k distance(z[i], codebook[k]); quantized[i] = codebook[indices[i]]

    distance is |z - e|^2 for "euclidean", 1 - z·e / (|z||e|) for "cosine" (1 if either is 0, that
    is shorter than 2^-50). The indices are exact: those of the formula in float64, summed as it
    stands, and the lowest one of equals. So two codes are told apart wherever float64 can: down to
    a relative gap of about dim 2^-53. No num_tokens x num_codes matrix is made.

    A code with an element that is NaN, infinite or 2^50 and more in magnitude never wins; a token
    with one, or without any valid code, gets index 0 and distance NaN. Nothing waits for the GPU.

    With sg for "no gradient": distance is that of z to sg(codebook), so that its mean / dim is the
    commitment loss; codebook_distance is that of sg(z) to the codebook: the codebook loss.

    Args:
        z: (num_tokens, dim), dim up to 1024. fp16, bf16, fp32 or fp64 (the last in plain PyTorch).
        codebook: (num_codes, dim), up to 2^20 codes, the dtype of z. Autocast casts neither.
        metric: "euclidean" or "cosine".
        straight_through: the gradient of quantized goes to z as if it were z; otherwise to the
            codebook, as that of an embedding.

    Returns:
        VQLookup(indices, quantized, distance, codebook_distance); distances in fp32 (fp64 for
        fp64). No tokens give empty tensors.

    Raises:
        ValueError: shapes that do not fit together, an unknown metric, too many codes.
        TypeError: dtypes or devices that differ, or z isn't floating point.

    Source: van den Oord et al., "Neural discrete representation learning", 2017, eqs. 1 to 3.
    """
    quantized, distance, codebook_distance, indices = _op(z, codebook, metric, straight_through)
    return VQLookup(indices, quantized, distance, codebook_distance)


def nearest(z: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """The indices, in float64 and in parts of the tokens, so that memory stays bounded."""
    tokens, codes = z.detach().double(), codebook.detach().double()
    never = ~_valid(codes)
    codes = codes.masked_fill(never[:, None], 0)
    found = []
    for part in tokens.split(max(1, (1 << 22) // codebook.shape[0])):
        if metric == "euclidean":
            mode = "donot_use_mm_for_euclid_dist"
            distance = torch.cdist(part, codes, compute_mode=mode)
        else:
            distance = 1 - _direction(part) @ _direction(codes).T
        found.append(distance.masked_fill(never, torch.inf).argmin(1))
    return torch.cat(found)


def reference(
    z: Tensor, codebook: Tensor, metric: str, straight_through: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    indices = nearest(z, codebook, metric)
    codes = codebook[indices]
    quantized = codes.detach() + (z - z.detach()) if straight_through else codes
    valid = _valid(z.detach()) & _valid(codes.detach())
    distances = (_distance(z, codes.detach(), metric), _distance(z.detach(), codes, metric))
    distance, codebook_distance = (torch.where(valid, d, torch.nan) for d in distances)
    return quantized, distance, codebook_distance, indices


def _valid(x: Tensor) -> Tensor:
    return (x.abs() < LARGEST).all(-1)


def _direction(x: Tensor) -> Tensor:
    """x at length 1, or 0 where it has no direction."""
    length = x.norm(dim=-1, keepdim=True)
    return torch.where(length < SHORTEST, 0, x / length.clamp(min=SHORTEST))


def _distance(z: Tensor, codes: Tensor, metric: str) -> Tensor:
    if z.dtype != torch.float64:
        z, codes = z.float(), codes.float()
    if metric == "euclidean":
        return (z - codes).square().sum(-1)
    return 1 - (_direction(z) * _direction(codes)).sum(-1)


def _kernel(
    z: Tensor, codebook: Tensor, metric: str, straight_through: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z, codebook = z.contiguous(), codebook.contiguous()
    quantized, distance, codebook_distance, indices = outputs = _fake(
        z, codebook, metric, straight_through
    )
    num_bytes = _core.C.vq_lookup_workspace(codebook)
    workspace = z.new_empty(num_bytes, dtype=torch.uint8) if num_bytes else None
    if not _core.C.vq_lookup(z, codebook, metric, indices, quantized, distance, workspace):
        with torch.no_grad():
            return reference(z, codebook, metric, False)
    codebook_distance.copy_(distance)
    return outputs


def _fake(
    z: Tensor, codebook: Tensor, metric: str, straight_through: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    num_tokens = z.shape[0]
    return (
        _library.empty(z),
        z.new_empty(num_tokens, dtype=dtype),
        z.new_empty(num_tokens, dtype=dtype),
        z.new_empty(num_tokens, dtype=torch.int64),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z, codebook, ctx.metric, ctx.straight_through = inputs
    quantized, _, _, indices = output
    ctx.num_codes = codebook.shape[0]
    ctx.save_for_backward(z, quantized, indices)  # not the codebook, which EMA moves meanwhile
    ctx.mark_non_differentiable(indices)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any,
    dquantized: Tensor | None,
    ddistance: Tensor | None,
    dcodebook_distance: Tensor | None,
    _: Any,
) -> tuple[Tensor | None, ...]:
    z, codes, indices = ctx.saved_tensors
    need_dz, need_dcodebook = ctx.needs_input_grad[:2]
    to_code = None if ctx.straight_through else dquantized
    dz = dquantized if need_dz and ctx.straight_through else None
    need_dz = need_dz and ddistance is not None
    need_dcodebook = need_dcodebook and not (dcodebook_distance is None and to_code is None)
    if not (need_dz or need_dcodebook):
        return dz, None, None, None
    grads = (dz, to_code, ddistance, dcodebook_distance)
    # On a GPU PyTorch's operations, which torch.compile fuses with those around.
    backward = reference_backward if z.is_cuda else _backward_op
    gradients = backward(
        z, codes, indices, *grads, ctx.num_codes, ctx.metric, need_dz, need_dcodebook
    )
    return gradients[0] if need_dz else dz, gradients[1] if need_dcodebook else None, None, None


def reference_backward(
    z: Tensor,
    codes: Tensor,
    indices: Tensor,
    to_z: Tensor | None,
    to_code: Tensor | None,
    ddistance: Tensor | None,
    dcodebook_distance: Tensor | None,
    num_codes: int,
    metric: str,
    need_dz: bool,
    need_dcodebook: bool,
) -> tuple[Tensor, Tensor]:
    dz, dcodebook = z.new_empty(0), z.new_empty(0)
    if need_dz:
        total = _total(_to_z(z, codes, ddistance, metric), to_z)
        assert total is not None
        dz = total.to(z.dtype)
    if need_dcodebook:
        rows = _total(_to_z(codes, z, dcodebook_distance, metric), to_code)
        assert rows is not None
        dcodebook = _rounded_sum_by_code(rows.to(_sum_dtype(z)), indices, num_codes, z.dtype)
    return dz, dcodebook


def _backward_kernel(
    z: Tensor, codes: Tensor, indices: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor]:
    *grads, num_codes, metric, need_dz, need_dcodebook = arguments
    z, grads = z.contiguous(), [None if x is None else x.contiguous() for x in grads]
    dz, dcodebook = _backward_fake(z, codes, indices, *arguments)
    outputs = dz if need_dz else None, dcodebook if need_dcodebook else None
    if _core.C.vq_lookup_backward(z, codes, indices, *grads, num_codes, metric, *outputs):
        return dz, dcodebook
    return reference_backward(z, codes, indices, *arguments)


def _backward_fake(z: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    num_codes, _, need_dz, need_dcodebook = arguments[-4:]
    dcodebook = z.new_empty((num_codes, z.shape[1]) if need_dcodebook else 0)
    return z.new_empty(z.shape if need_dz else 0), dcodebook


def sum_by_code(rows: Tensor, indices: Tensor, num_codes: int) -> Tensor:
    """(num_codes, dim): sums of the rows (num_tokens, dim) of each code."""
    # By sorting on CUDA and in rows of vectors on the CPU; index_add_ does neither.
    sums: Tensor = torch.ops.aten.embedding_dense_backward(rows, indices, num_codes, -1, False)
    return sums


def _rounded_sum_by_code(
    rows: Tensor, indices: Tensor, num_codes: int, dtype: torch.dtype
) -> Tensor:
    """sum_by_code, rounded: where tokens are few, no codebook of sums comes first."""
    if dtype == rows.dtype or len(indices) >= num_codes:
        return sum_by_code(rows, indices, num_codes).to(dtype)
    # Each code that occurs has the place of one of its tokens, whichever.
    place = indices.new_empty(num_codes)
    place[indices] = torch.arange(len(indices), device=indices.device)
    of_token = place[indices]
    sums = sum_by_code(rows, of_token, len(indices)).to(dtype)
    rounded = rows.new_zeros((num_codes, rows.shape[1]), dtype=dtype)
    rounded[indices] = sums[of_token]
    return rounded


def _total(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _to_z(z: Tensor, codes: Tensor, ddistance: Tensor | None, metric: str) -> Tensor | None:
    """ddistance times the gradient of distance(z, codes) by z; by codes with the two exchanged."""
    if ddistance is None:
        return None
    z, codes, scale = z.to(_sum_dtype(z)), codes.to(_sum_dtype(z)), ddistance[:, None]
    if metric == "euclidean":
        return (z - codes) * (2 * scale)
    z_direction, direction = _direction(z), _direction(codes)
    similarity = (z_direction * direction).sum(-1, keepdim=True)
    length = z.norm(dim=-1, keepdim=True)
    gradient = (similarity * z_direction - direction) / length.clamp(min=SHORTEST)
    return torch.where(length < SHORTEST, 0, gradient) * scale


_backward_op = _library.define(
    "vq_lookup_backward(Tensor z, Tensor codes, Tensor indices, Tensor? to_z, Tensor? to_code, "
    "Tensor? ddistance, Tensor? dcodebook_distance, SymInt num_codes, str metric, bool need_dz, "
    "bool need_dcodebook) -> (Tensor, Tensor)",
    kernel=_backward_kernel,
    fake=_backward_fake,
    reference=reference_backward,
)
_op = _library.define(
    "vq_lookup(Tensor z, Tensor codebook, str metric, bool straight_through)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    kernel=_kernel,
    fake=_fake,
    reference=reference,
    setup_context=_setup_context,
    backward=_backward,
)
