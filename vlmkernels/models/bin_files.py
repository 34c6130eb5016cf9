"""Weights in PyTorch's own files (.bin), as checkpoints before safetensors have them.

Only tensors are unpickled (weights_only=True), and they stay in the file until they are read; those
of a file in the format before torch 1.6, which is no zip, are read at once.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BIN_WEIGHTS, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
# As a safetensors header names them.
NAMES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}


class Header:
    """One tensor: `get_slice` of safetensors."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def get_dtype(self) -> str:
        return NAMES.get(self.tensor.dtype, str(self.tensor.dtype))

    def __getitem__(self, rows: slice) -> Tensor:
        return self.tensor[rows]


class BinFile:
    """A file of tensors by name, with what this package calls of safetensors' `safe_open`.

    Raises ValueError for a file that is damaged or holds anything but tensors.
    """

    def __init__(self, file: Path) -> None:
        try:
            mmap = zipfile.is_zipfile(file)
            content: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
        except Exception as error:  # pickle raises nearly anything
            raise ValueError(f"{file}: truncated or not a file of tensors: {error}") from error
        if not isinstance(content, dict) or not all(
            isinstance(name, str) and isinstance(x, Tensor) for name, x in content.items()
        ):
            raise ValueError(f"{file}: expected tensors by name, got something else")
        self.tensors: dict[str, Tensor] = content

    def keys(self) -> Iterable[str]:
        return self.tensors.keys()

    def get_slice(self, name: str) -> Header:
        return Header(self.tensors[name])

    def get_tensor(self, name: str) -> Tensor:
        return self.tensors[name]
