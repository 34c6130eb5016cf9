"""Images as (num_images, 3, height, width): the image processors of ViT, CLIP and LLaVA.

Bit-equal to transformers' Pillow processors: the same steps in the same order, each rounded alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vlmkernels.models.checkpoint import Json
from vlmkernels.models.fields import (
    COUNT,
    OBJECT,
    THREE_NUMBERS,
    THREE_POSITIVE,
    Kind,
    expect,
    expect_fields,
)
from vlmkernels.models.images import Pixels, load_rgb

RESAMPLE = Kind(f"one of {[*map(int, Image.Resampling)]}", lambda x: x in [*Image.Resampling])
CLIP_MEAN, CLIP_STD = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)


@dataclass
class PixelTable:
    """What each byte of each channel becomes: (byte * rescale_factor - mean) / std."""

    do_rescale: bool = True
    do_normalize: bool = True
    rescale_factor: float = 1 / 255
    image_mean: Sequence[float] = CLIP_MEAN
    image_std: Sequence[float] = CLIP_STD

    def table(self) -> NDArray[np.float32]:
        """(3, 256), rounded as transformers does."""
        values = np.arange(256, dtype=np.float64)
        table = (values * self.rescale_factor if self.do_rescale else values).astype(np.float32)
        table = np.tile(table, (3, 1))
        if self.do_normalize:
            mean, std = np.array([self.image_mean, self.image_std], dtype=np.float32)[..., None]
            table = (table - mean) / std
        return table


@dataclass
class ImageSettings(PixelTable):
    """Pad to a square, resize, crop the centre, normalize. Reads preprocessor_config.json.

    size: (height, width), or the shortest edge alone, which keeps the aspect ratio. Raises
    ValueError for a field of another type or range than its own.
    """

    do_pad: bool = False
    do_resize: bool = True
    do_center_crop: bool = True
    resample: int = int(Image.Resampling.BICUBIC)
    size: int | tuple[int, int] = 224
    crop_size: tuple[int, int] = (224, 224)
    raw: Json = field(default_factory=dict, repr=False, compare=False)

    processor_type: ClassVar[str] = "CLIPImageProcessor"

    def __post_init__(self) -> None:
        expect_fields(self, resample=RESAMPLE, image_mean=THREE_NUMBERS, image_std=THREE_POSITIVE)
        self.image_mean, self.image_std = tuple(self.image_mean), tuple(self.image_std)
        for edge in (*_as_tuple(self.size), *self.crop_size):
            expect("size", edge, COUNT)

    @classmethod
    def from_dict(cls, raw: Json) -> Self:
        names = {f.name for f in dataclasses.fields(cls)} - {"raw", "size", "crop_size"}
        known = {k: v for k, v in raw.items() if k in names and v is not None}
        if raw.get("size") is not None:
            known["size"] = _read_size("size", raw["size"], cls.size)
        if raw.get("crop_size") is not None:
            known["crop_size"] = _square(_read_size("crop_size", raw["crop_size"], 0))
        return cls(**known, raw=raw)

    def to_dict(self) -> Json:
        out = {"image_processor_type": self.processor_type} | self.raw | dataclasses.asdict(self)
        out.pop("raw")
        size, crop = self.size, self.crop_size
        edges = {"shortest_edge": size} if isinstance(size, int) else _edges(size)
        out |= {"size": edges, "crop_size": _edges(crop)}
        return out | {"image_mean": [*self.image_mean], "image_std": [*self.image_std]}

    def __call__(self, images: Any) -> Tensor:
        """One image or many (vlmkernels.models.images.load_rgb) -> (num_images, 3, height, width).

        Raises ValueError for what is no image, and for images that end in different sizes.
        """
        pixels = [self._fit(load_rgb(x, f"images[{i}]")) for i, x in enumerate(as_list(images))]
        sizes = sorted({x.shape[:2] for x in pixels})
        if len(sizes) > 1:
            raise ValueError(f"images: expected one size after resizing, got {sizes}")
        table, batch = self.table(), np.stack(pixels)
        return torch.from_numpy(np.stack([table[c][batch[..., c]] for c in range(3)], axis=1))

    def _fit(self, image: Pixels) -> Pixels:
        if self.do_pad:
            image = pad_to_square(image, [int(x * 255) for x in self.image_mean])
        if self.do_resize:
            image = resize(image, self._target(image), self.resample)
        return center_crop(image, self.crop_size) if self.do_center_crop else image

    def _target(self, image: Pixels) -> tuple[int, int]:
        if not isinstance(self.size, int):
            return self.size
        height, width = image.shape[:2]
        long = int(self.size * max(height, width) / min(height, width))
        return (long, self.size) if width <= height else (self.size, long)


def resize(image: Pixels, size: tuple[int, int], resample: int) -> Pixels:
    """To (height, width), by Pillow."""
    if image.shape[:2] == size:
        return image
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling(resample)))


def center_crop(image: Pixels, size: tuple[int, int]) -> Pixels:
    """The middle (height, width), in black where the image is smaller; rounds as transformers."""
    for axis, (length, wanted) in enumerate(zip(image.shape[:2], size, strict=True)):
        short = max(wanted - length, 0)
        edges = [(0, 0)] * 3
        edges[axis] = ((short + 1) // 2, short // 2)
        start = max(length - wanted, 0) // 2
        image = np.pad(image, edges).take(range(start, start + wanted), axis=axis)
    return image


def pad_to_square(image: Pixels, colour: Sequence[int]) -> Pixels:
    """The image in the middle of a square of that colour (LLaVA's expand2square)."""
    height, width = image.shape[:2]
    edge = max(height, width)
    square = np.empty((edge, edge, 3), np.uint8)
    square[:] = colour
    top, left = (edge - height) // 2, (edge - width) // 2
    square[top : top + height, left : left + width] = image
    return square


def as_list(images: Any) -> list[Any]:
    """One image, a list of them, or a list per text, as one list."""
    if images is None:
        return []
    if not isinstance(images, (list, tuple)):
        return [images]
    return [x for item in images for x in as_list(item)]


def _as_tuple(size: int | tuple[int, int]) -> tuple[int, ...]:
    return (size,) if isinstance(size, int) else size


def _square(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _edges(size: tuple[int, int]) -> Json:
    return {"height": size[0], "width": size[1]}


def _read_size(key: str, size: Any, like: int | tuple[int, int]) -> int | tuple[int, int]:
    """A number (older files; a square where `like` is one) or {"shortest_edge"} or both edges."""
    if isinstance(size, int):
        return size if isinstance(like, int) else (size, size)
    edges = expect(key, size, OBJECT)
    if "shortest_edge" in edges:
        return int(expect(key, edges["shortest_edge"], COUNT))
    height, width = (expect(key, edges.get(name), COUNT) for name in ("height", "width"))
    return height, width
