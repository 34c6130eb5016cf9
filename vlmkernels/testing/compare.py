"""The error rule: a kernel may be at most twice as wrong as PyTorch in the same dtype."""

import torch
from torch import Tensor


def max_error(x: Tensor, exact: Tensor) -> float:
    """max |x - exact| in float64; infinity when a NaN or an infinity stands in the wrong place."""
    x, exact = x.detach().double(), exact.detach().double()
    if x.shape != exact.shape:
        raise AssertionError(f"shape {tuple(x.shape)} differs from {tuple(exact.shape)}")
    if x.numel() == 0:
        return 0.0
    difference = torch.where(x == exact, torch.zeros_like(x), (x - exact).abs())
    return float(torch.nan_to_num(difference, nan=torch.inf, posinf=torch.inf).max())


def assert_as_accurate(
    name: str, got: Tensor, same_dtype: Tensor, exact: Tensor, *, factor: float = 2.0
) -> None:
    """Asserts max|got - exact| <= factor * max|same_dtype - exact| + one rounding of max|exact|.

    got: the kernel's result. same_dtype: plain PyTorch's in the same dtype. exact: float64 (or
    float32 for 16-bit dtypes) from the same inputs. The rule is flash-attention's.
    """
    if got.dtype != same_dtype.dtype:
        raise AssertionError(f"{name}: dtype {got.dtype}, expected {same_dtype.dtype}")
    finite = exact.detach().double()
    finite = finite[finite.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    rounding = torch.finfo(got.dtype).eps * scale
    error, allowed = max_error(got, exact), factor * max_error(same_dtype, exact) + rounding
    if not error <= allowed:
        raise AssertionError(f"{name}: error {error:.3g} > {allowed:.3g} allowed")
