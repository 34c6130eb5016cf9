"""null against torch's clone: the memory ceiling of this machine."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.case import Case, both_directions, dtype_name


def clone(x: Tensor) -> Tensor:
    return x.clone()


def cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    for num_bytes in (1 << 16, 1 << 22, 1 << 26):
        x = torch.randn(num_bytes // dtype.itemsize, device=device).to(dtype)
        forward, _ = both_directions(
            "null",
            {"x": x.requires_grad_()},
            clone,
            op="null",
            shape=f"{num_bytes >> 10} KiB",
            dtype=dtype_name(x),
            bytes=(2 * num_bytes,) * 2,
            flops=(0, 0),
        )
        yield forward
