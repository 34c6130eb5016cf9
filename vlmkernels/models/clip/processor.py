"""CLIP processor: texts and images in, model arguments out; Pillow and numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from vlmkernels.models.chat import as_texts
from vlmkernels.models.checkpoint import read_json, write_json
from vlmkernels.models.pixels import CLIP_MEAN, CLIP_STD, ImageSettings
from vlmkernels.models.tokenizer import Tokenizer

from . import open_clip


class ClipProcessor:
    """Turns texts and images into tensors."""

    def __init__(
        self, tokenizer: Tokenizer, image: ImageSettings | None = None, max_seqlen: int = 77
    ) -> None:
        self.tokenizer = tokenizer
        self.image = image or ImageSettings()
        self.max_seqlen = max_seqlen

    @classmethod
    def from_pretrained(cls, path: str | Path) -> ClipProcessor:
        """From a checkpoint directory, in the Hugging Face layout or in open_clip's."""
        path = Path(path)
        tokenizer = Tokenizer.from_pretrained(path)
        if open_clip.is_directory(path):
            raw = read_json(path / open_clip.OPEN_CLIP_CONFIG)
            config, shown = open_clip.config_from(raw), raw.get("preprocess_cfg") or {}
            size = config.vision.image_size
            image = ImageSettings(
                resample=int(Image.Resampling.BICUBIC),
                size=size,
                crop_size=(size, size),
                image_mean=shown.get("mean", CLIP_MEAN),
                image_std=shown.get("std", CLIP_STD),
            )
            return cls(tokenizer, image, config.text.max_position_embeddings)
        image = ImageSettings.from_dict(read_json(path / "preprocessor_config.json"))
        return cls(tokenizer, image, int(tokenizer.config.get("model_max_length", 77)))

    def save_pretrained(self, path: str | Path) -> None:
        """Write the tokenizer's files and preprocessor_config.json."""
        self.tokenizer.save_pretrained(path)
        write_json(Path(path) / "preprocessor_config.json", self.image.to_dict())

    def __call__(
        self, text: str | Sequence[str] | None = None, images: Any = None
    ) -> dict[str, Tensor]:
        """Model arguments for texts, images or both.

        Args:
            text: one or many; longer ones are cut to max_seqlen tokens, their end token stays.
            images: one or many (vlmkernels.models.images.load_rgb).

        Returns:
            input_ids, attention_mask (num_texts, seqlen) int64, padded on the right; pixel_values
            (num_images, 3, height, width) float32.
        """
        out: dict[str, Tensor] = {}
        if text is not None:
            out |= self.tokenizer.pad([self._encode(t) for t in as_texts(text)], "right")
        if images is not None:
            out["pixel_values"] = self.image(images)
        if not out:
            raise ValueError("text: expected text, images or both, got neither")
        return out

    def _encode(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text, add_special_tokens=True)
        return ids if len(ids) <= self.max_seqlen else ids[: self.max_seqlen - 1] + ids[-1:]
