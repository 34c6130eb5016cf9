"""ViT processor: images in, pixel_values out; Pillow and numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from vlmkernels.models.checkpoint import read_json, write_json
from vlmkernels.models.pixels import ImageSettings


@dataclass
class ViTImageSettings(ImageSettings):
    """Squashed to a square, bilinear, to [-1, 1]: bit-equal to transformers' Pillow processor."""

    do_center_crop: bool = False
    resample: int = int(Image.Resampling.BILINEAR)
    size: int | tuple[int, int] = (224, 224)
    image_mean: Sequence[float] = (0.5, 0.5, 0.5)
    image_std: Sequence[float] = (0.5, 0.5, 0.5)

    processor_type = "ViTImageProcessor"


class ViTProcessor:
    """Turns images of any kind into the model's argument."""

    def __init__(self, image: ViTImageSettings | None = None) -> None:
        self.image = image or ViTImageSettings()

    @classmethod
    def from_pretrained(cls, path: str | Path) -> ViTProcessor:
        """From a checkpoint directory."""
        file = Path(path) / "preprocessor_config.json"
        return cls(ViTImageSettings.from_dict(read_json(file)))

    def save_pretrained(self, path: str | Path) -> None:
        """Write preprocessor_config.json."""
        Path(path).mkdir(parents=True, exist_ok=True)
        write_json(Path(path) / "preprocessor_config.json", self.image.to_dict())

    def __call__(self, images: Any) -> dict[str, Tensor]:
        """One image or many -> pixel_values (num_images, 3, height, width) float32."""
        return {"pixel_values": self.image(images)}
