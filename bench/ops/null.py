"""null against torch's clone: the memory ceiling of this machine."""

from collections.abc import Iterator
from functools import partial

import torch

from bench.case import Case
from vlmkernels import ops


def cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    for num_bytes in (1 << 16, 1 << 22, 1 << 26):
        x = torch.randn(num_bytes // dtype.itemsize, device=device).to(dtype)
        yield Case(
            op="null",
            shape=f"{num_bytes >> 10} KiB",
            dtype=str(dtype).removeprefix("torch."),
            direction="fwd",
            bytes=2 * num_bytes,
            flops=0,
            variants={"vlmkernels": partial(ops.null, x), "eager": x.clone},
        )
