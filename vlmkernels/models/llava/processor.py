"""LLaVA-1.5 processor: text and images in, model arguments out; Pillow and numpy only."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vlmkernels.models.chat import as_texts, grow, read_processor
from vlmkernels.models.checkpoint import CONFIG, Json, read_json, write_json
from vlmkernels.models.pixels import ImageSettings, as_list
from vlmkernels.models.supervised import TemplateProcessor
from vlmkernels.models.tokenizer import Tokenizer

from .config import LlavaConfig

# The conversation that LLaVA-1.5 was trained on (conv_vicuna_v1 of the original code).
VICUNA_V1 = (
    "{% if messages[0]['role'] != 'system' %}A chat between a curious user and an artificial "
    "intelligence assistant. The assistant gives helpful, detailed, and polite answers to the "
    "user's questions. {% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% elif message['role'] == 'assistant' %}ASSISTANT: "
    "{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\\n' }}"
    "{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}</s>{% else %}{{ ' ' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@dataclass
class LlavaImageSettings(ImageSettings):
    """CLIP's at 336 pixels; do_pad: first pad to a square, as the original code does."""

    size: int | tuple[int, int] = 336
    crop_size: tuple[int, int] = (336, 336)

    processor_type = "LlavaImageProcessor"


class LlavaProcessor(TemplateProcessor):
    """Turns text with <image> and the images for it into tensors.

    patch_size, select: as of the vision tower; they say how many tokens an image has. Without a
    chat template in the checkpoint, conversations are those of VICUNA_V1.
    """

    adds_special_tokens = True

    def __init__(
        self,
        tokenizer: Tokenizer,
        image: ImageSettings | None = None,
        *,
        patch_size: int = 14,
        select: str = "default",
        image_token: str = "<image>",
    ) -> None:
        self.tokenizer = tokenizer
        tokenizer.chat_template = tokenizer.chat_template or VICUNA_V1
        self.image = image or LlavaImageSettings()
        self.patch_size, self.select, self.image_token = patch_size, select, image_token
        self.image_token_id = tokenizer.token_to_id(image_token)

    @property
    def feature_ids(self) -> tuple[int, ...]:
        return (self.image_token_id,)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> LlavaProcessor:
        """From a checkpoint directory; config.json says what processor_config.json does not."""
        path = Path(path)
        own, image = read_processor(path)
        config = LlavaConfig.from_dict(read_json(path / CONFIG))
        return cls(
            Tokenizer.from_pretrained(path),
            LlavaImageSettings.from_dict(image),
            patch_size=own.get("patch_size") or config.vision.patch_size,
            select=own.get("vision_feature_select_strategy")
            or config.vision_feature_select_strategy,
            image_token=own.get("image_token") or "<image>",
        )

    def save_pretrained(self, path: str | Path) -> None:
        """Write the tokenizer's files, preprocessor_config.json and processor_config.json."""
        path = Path(path)
        self.tokenizer.save_pretrained(path)
        kind = {"processor_class": "LlavaProcessor"}
        write_json(path / "preprocessor_config.json", self.image.to_dict() | kind)
        own: Json = {
            "image_token": self.image_token,
            "num_additional_image_tokens": 1,  # [CLS]
            "patch_size": self.patch_size,
            "vision_feature_select_strategy": self.select,
        }
        write_json(path / "processor_config.json", own | kind)

    def __call__(
        self,
        text: str | Sequence[str],
        images: Any = None,
        *,
        pad_to_square: bool | None = None,
        padding_side: str | None = None,
    ) -> dict[str, Tensor]:
        """Model arguments for one text or a batch.

        Args:
            text: each <image> in it stands for one image, in order, and grows to as many tokens
                as that has features. The tokenizer puts its start token in front.
            images: one or many (vlmkernels.models.images.load_rgb), for the whole batch in order.
            pad_to_square: True pads each image to a square of the mean colour before resizing
                (the original code), False cuts its centre out (Hugging Face's); None: as the
                checkpoint says.
            padding_side: "left" or "right"; the tokenizer's by default.

        Returns:
            input_ids, attention_mask (batch, seqlen) int64; with images pixel_values (num_images,
            3, height, width) float32.

        Raises:
            ValueError: an image that cannot be read, placeholders and images that do not match.
        """
        texts, out = as_texts(text), {}
        count, settings = 0, self.image
        image_list = as_list(images)
        if pad_to_square is not None:
            settings = dataclasses.replace(settings, do_pad=pad_to_square)
        if image_list:
            pixels = settings(image_list)
            out["pixel_values"] = pixels
            height, width = pixels.shape[2:]
            count = (height // self.patch_size) * (width // self.patch_size)
            count += self.select == "full"
        texts = grow(texts, {self.image_token: [count] * len(image_list)})
        rows = [
            self.tokenizer.encode(t, add_special_tokens=self.adds_special_tokens) for t in texts
        ]
        return self.tokenizer.pad(rows, padding_side) | out
