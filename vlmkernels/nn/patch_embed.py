"""PatchEmbed2d and PatchEmbed3d: patch embedding with the parameters of Conv2d and Conv3d."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmkernels import ops


class _PatchEmbed(torch.nn.Module):
    _conv: ClassVar[type[torch.nn.Conv2d] | type[torch.nn.Conv3d]]
    weight: torch.nn.Parameter
    bias: torch.nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        *,  # a convolution's next is stride
        stride: int | tuple[int, ...] | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        # The convolution only gives its parameters, initialised as it does.
        make: Any = self._conv
        stride = kernel_size if stride is None else stride
        conv = make(
            in_channels, out_channels, kernel_size, stride, bias=bias, device=device, dtype=dtype
        )
        if conv.stride != conv.kernel_size:
            raise ValueError(
                f"{type(self).__name__}: stride must be kernel_size {conv.kernel_size}, "
                f"got {stride}"
            )
        self._take(conv)

    @classmethod
    def from_conv(cls, conv: torch.nn.Conv2d | torch.nn.Conv3d) -> "_PatchEmbed":
        """The same patch embedding, sharing the convolution's parameters.

        Raises:
            TypeError: conv is of another class.
            ValueError: its stride isn't its kernel size, or it has padding, dilation or groups.
        """
        if not isinstance(conv, cls._conv):
            raise TypeError(
                f"{cls.__name__}: conv must be a {cls._conv.__name__}, got {type(conv).__name__}"
            )
        rank = len(conv.kernel_size)
        plain = (
            tuple(conv.stride) == tuple(conv.kernel_size)
            and (conv.padding == "valid" or tuple(conv.padding) == (0,) * rank)
            and tuple(conv.dilation) == (1,) * rank
            and conv.groups == 1
        )
        if not plain:
            raise ValueError(
                f"{cls.__name__}: conv must have stride == kernel_size, no padding, dilation or "
                f"groups, got {conv}"
            )
        module = cls.__new__(cls)
        torch.nn.Module.__init__(module)
        module._take(conv)
        return module.train(conv.training)

    def _take(self, conv: Any) -> None:
        self.in_channels = conv.in_channels
        self.out_channels = conv.out_channels
        self.kernel_size = conv.kernel_size
        self.weight = conv.weight
        self.register_parameter("bias", conv.bias)

    def forward(self, x: Tensor, pos_embed: Tensor | None = None) -> Tensor:
        """x: images or video (num_images, channels, ...), or rows (num_patches, patch_dim);
        pos_embed: (num_patches, out_channels)."""
        return ops.patch_embed(x, self.weight, self.bias, pos_embed)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"bias={self.bias is not None}"
        )


class PatchEmbed2d(_PatchEmbed):
    """Images (num_images, channels, h, w) to tokens (num_images, num_patches, out_channels), or
    rows (num_patches, patch_dim) to (num_patches, out_channels): `vlmkernels.ops.patch_embed` with
    parameters.

    Drop-in for `torch.nn.Conv2d(..., kernel_size, stride=kernel_size)`, same state_dict; stride may
    be left out, another one is a ValueError. Its output is the convolution's after
    `.flatten(2).transpose(1, 2)`.
    """

    _conv = torch.nn.Conv2d


class PatchEmbed3d(_PatchEmbed):
    """Video (num_images, channels, t, h, w) to tokens (num_images, num_patches, out_channels), or
    rows (num_patches, patch_dim) to (num_patches, out_channels): `vlmkernels.ops.patch_embed` with
    parameters.

    Drop-in for `torch.nn.Conv3d(..., kernel_size, stride=kernel_size)`, same state_dict; stride may
    be left out, another one is a ValueError. Its output is the convolution's after
    `.flatten(2).transpose(1, 2)`. Rows are what transformers' Qwen2-VL processors give: columns
    ordered (channel, t, h, w), as the weight is.
    """

    _conv = torch.nn.Conv3d
