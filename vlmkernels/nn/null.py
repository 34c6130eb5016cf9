"""Null: y = x in new memory. The module to copy when adding one."""

import torch
from torch import Tensor

from vlmkernels import ops


class Null(torch.nn.Module):
    """y = x, in new memory. Drop-in for `torch.nn.Identity` (whose output is x itself)."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.null(x)
