"""Images of any kind as RGB uint8 arrays, with clear errors; Pillow and numpy only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

# A larger picture is refused before it is decoded (Pillow's own limit for "decompression bombs").
MAX_IMAGE_PIXELS = 178_956_970

_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
Pixels = NDArray[np.uint8]


def load_rgb(image: Any, name: str = "image") -> Pixels:
    """A path, PIL image, array or tensor -> (height, width, 3) uint8.

    Arrays are uint8, (height, width), (height, width, channels) or (channels, height, width) with
    1, 3 or 4 channels. Transparency is laid over white. A file's EXIF rotation is applied. 16-bit
    grey keeps its upper byte (Pillow's own conversion would clip it to white).

    Raises ValueError, naming `name`: not an image, truncated, empty, too large, another dtype.
    """
    if isinstance(image, (str, Path)):
        return _open(Path(image))
    if isinstance(image, Image.Image):
        return _check_size(_pil_to_rgb(image, name), name)
    if hasattr(image, "detach"):  # a torch tensor
        image = image.detach().cpu().numpy()
    if not isinstance(image, np.ndarray):
        raise ValueError(f"{name}: expected a path, PIL image or array, got {type(image).__name__}")
    return _check_size(_array_to_rgb(image, name), name)


def _open(path: Path) -> Pixels:
    if not path.is_file():
        raise ValueError(f"image {path}: expected an image file, found none")
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError(
                    f"{image.width} x {image.height} pixels, more than {MAX_IMAGE_PIXELS}"
                )
            image.load()
            return _check_size(_pil_to_rgb(ImageOps.exif_transpose(image), str(path)), str(path))
    # Pillow's decoders raise many kinds of error on damaged files.
    except Exception as error:
        raise ValueError(f"image {path}: expected a readable image, got: {error}") from error


def _pil_to_rgb(image: Image.Image, name: str) -> Pixels:
    try:
        if image.mode.startswith("I"):
            return _array_to_rgb(_upper_byte(np.asarray(image)), name)
        if image.mode in _ALPHA_MODES or image.info.get("transparency") is not None:
            image = image.convert("LA") if image.mode == "La" else image
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image)
        return np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{name}: cannot be converted to RGB: {error}") from error


def _upper_byte(grey: NDArray[Any]) -> Pixels:
    grey = np.clip(grey, 0, 65535)
    return (grey >> 8 if grey.max(initial=0) > 255 else grey).astype(np.uint8)


def _array_to_rgb(array: NDArray[Any], name: str) -> Pixels:
    if array.dtype != np.uint8:
        raise ValueError(f"{name}: expected dtype uint8, got {array.dtype}")
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim == 3 and array.shape[2] == 4:
        return _pil_to_rgb(Image.fromarray(np.ascontiguousarray(array), "RGBA"), name)
    if array.ndim == 2:
        return np.repeat(array[..., None], 3, axis=2)
    if array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"{name}: expected shape (height, width, channels), got {array.shape}")
    return np.ascontiguousarray(array)


def _check_size(pixels: Pixels, name: str) -> Pixels:
    height, width = pixels.shape[:2]
    if not 0 < height * width <= MAX_IMAGE_PIXELS:
        raise ValueError(f"{name}: expected 1 to {MAX_IMAGE_PIXELS} pixels, got {width} x {height}")
    return pixels
