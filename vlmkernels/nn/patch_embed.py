"""PatchEmbed2d and PatchEmbed3d: patch embedding with the parameters of Conv2d and Conv3d."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmkernels import ops
from vlmkernels.nn._arguments import expect_positive, typed


class _PatchEmbed(torch.nn.Module):
    _conv: ClassVar[type[torch.nn.Conv2d] | type[torch.nn.Conv3d]]
    weight: torch.nn.Parameter
    bias: torch.nn.Parameter | None

    @typed
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        *,  # a convolution's next is stride
        stride: int | Sequence[int] | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        rescale: float = 1 / 255,
        merge_size: int = 1,
    ) -> None:
        super().__init__()
        expect_positive(self, in_channels=in_channels, out_channels=out_channels)
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
        self._take(conv, mean, std, rescale, merge_size)

    @classmethod
    def from_conv(
        cls,
        conv: torch.nn.Conv2d | torch.nn.Conv3d,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        rescale: float = 1 / 255,
        merge_size: int = 1,
    ) -> "_PatchEmbed":
        """The same patch embedding, sharing the convolution's parameters.

        Raises:
            TypeError: conv is of another class.
            ValueError: its stride isn't its kernel size, it has padding, dilation or groups, or
                only one of mean and std is given.
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
        module._take(conv, mean, std, rescale, merge_size)
        return module.train(conv.training)

    def _take(self, conv: Any, mean: Any, std: Any, rescale: float, merge_size: int) -> None:
        if (mean is None) != (std is None):
            raise ValueError(f"{type(self).__name__}: expected mean and std, got only one of them")
        self.mean = None if mean is None else tuple(float(x) for x in mean)
        self.std = None if std is None else tuple(float(x) for x in std)
        self.rescale, self.merge_size = rescale, merge_size
        self.in_channels = conv.in_channels
        self.out_channels = conv.out_channels
        self.kernel_size = conv.kernel_size
        self.weight = conv.weight
        self.register_parameter("bias", conv.bias)

    def forward(
        self,
        x: Tensor | Sequence[Tensor],
        pos_embed: Tensor | None = None,
        grid_thw: Tensor | None = None,
    ) -> Tensor:
        """x: pixels as `vlmkernels.ops.patch_embed_pixels` takes them, uint8 ones to be normalised
        with mean, std and rescale, floating ones normalised already; pos_embed: (num_patches,
        out_channels); grid_thw: of packed images.

        Raises ValueError for uint8 pixels where no mean and std were given.
        """
        if not isinstance(x, Tensor | Sequence):
            raise TypeError(
                f"{type(self).__name__}: x must be a torch.Tensor or a sequence of them, got "
                f"{type(x).__name__}"
            )
        first = x if isinstance(x, Tensor) else next(iter(x), None)
        is_bytes = isinstance(first, Tensor) and first.dtype == torch.uint8
        if is_bytes and (self.mean is None or self.std is None):
            raise ValueError(
                f"{type(self).__name__}: expected mean and std at construction for uint8 pixels, "
                "got none"
            )
        rows = isinstance(x, Tensor) and x.ndim == 2  # in an order already
        merge_size = 1 if rows else self.merge_size
        plain = not is_bytes and merge_size == 1 and grid_thw is None
        if plain and isinstance(x, Tensor) and x.ndim in (2, self.weight.ndim):
            return ops.patch_embed(x, self.weight, self.bias, pos_embed)
        normalised = {"mean": [0.0] * self.in_channels, "std": [1.0] * self.in_channels}
        how: Any = normalised | {"rescale": 1.0}
        if is_bytes:
            how = {"mean": self.mean, "std": self.std, "rescale": self.rescale}
        return ops.patch_embed_pixels(
            *(x, self.weight, self.bias, pos_embed),
            **how,
            grid_thw=grid_thw,
            merge_size=merge_size,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"bias={self.bias is not None}"
            + ("" if self.mean is None else f", mean={self.mean}, std={self.std}")
            + ("" if self.merge_size == 1 else f", merge_size={self.merge_size}")
        )


class PatchEmbed2d(_PatchEmbed):
    """Images (num_images, channels, h, w) to tokens (num_images, num_patches, out_channels), or
    rows (num_patches, patch_dim) to (num_patches, out_channels): `vlmkernels.ops.patch_embed` with
    parameters.

    Drop-in for `torch.nn.Conv2d(..., kernel_size, stride=kernel_size)`, same state_dict; stride may
    be left out, another one is a ValueError. Its output is the convolution's after
    `.flatten(2).transpose(1, 2)`. With the image processor's mean and std (of pixels times rescale)
    it takes uint8 pixels as well, and images of different sizes as a sequence.
    """

    _conv = torch.nn.Conv2d


class PatchEmbed3d(_PatchEmbed):
    """Video (num_images, channels, t, h, w) to tokens (num_images, num_patches, out_channels), or
    rows (num_patches, patch_dim) to (num_patches, out_channels): `vlmkernels.ops.patch_embed` with
    parameters.

    Drop-in for `torch.nn.Conv3d(..., kernel_size, stride=kernel_size)`, same state_dict; stride may
    be left out, another one is a ValueError. Its output is the convolution's after
    `.flatten(2).transpose(1, 2)`. Rows are what transformers' Qwen2-VL processors give: columns
    ordered (channel, t, h, w), as the weight is. With the image processor's mean and std it takes
    uint8 pixels as well: video, or still images (num_images, channels, h, w) or a sequence of them,
    which need half the work; merge_size=2 then gives tokens in the order of those rows.
    """

    _conv = torch.nn.Conv3d
