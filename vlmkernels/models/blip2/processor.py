"""BLIP-2 processor: images and texts in, model arguments out; Pillow and numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vlmkernels.models.chat import ChatProcessor, as_texts, read_processor
from vlmkernels.models.checkpoint import CONFIG, read_json, write_json
from vlmkernels.models.pixels import ImageSettings
from vlmkernels.models.tokenizer import Tokenizer

from .config import Blip2Config

# How the paper asks (appendix) and LAVIS goes on asking; a turn with nothing but an image asks for
# its caption.
QUESTION_ANSWER = (
    "{% for message in messages %}"
    "{% if message['content'] is string %}{% set text = message['content'] %}"
    "{% else %}{% set text = message['content'] | selectattr('type', 'equalto', 'text')"
    " | map(attribute='text') | join(' ') %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ ' ' + text + '. ' }}"
    "{% elif text %}{{ 'Question: ' + text + ' Answer:' }}{% endif %}"
    "{% endfor %}"
)


@dataclass
class BlipImageSettings(ImageSettings):
    """Squashed to a square, bicubic: bit-equal to transformers' Pillow processor."""

    do_center_crop: bool = False
    size: int | tuple[int, int] = (224, 224)

    processor_type = "BlipImageProcessor"


class Blip2Processor(ChatProcessor):
    """Turns images and texts into tensors.

    Every text has the placeholders of one image in front: num_query_tokens of image_token_id, or
    none at all where that is None (first stage). Without a chat template in the checkpoint,
    conversations are those of QUESTION_ANSWER.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        image: ImageSettings | None = None,
        *,
        num_query_tokens: int = 32,
        image_token_id: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        tokenizer.chat_template = tokenizer.chat_template or QUESTION_ANSWER
        self.image = image or BlipImageSettings()
        self.num_query_tokens, self.image_token_id = num_query_tokens, image_token_id

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Blip2Processor:
        """From a checkpoint directory, whose config.json tells of the placeholders."""
        path = Path(path)
        _, image = read_processor(path)
        config = Blip2Config.from_dict(read_json(path / CONFIG))
        return cls(
            Tokenizer.from_pretrained(path),
            BlipImageSettings.from_dict(image),
            num_query_tokens=config.num_query_tokens,
            image_token_id=config.image_token_index,
        )

    def save_pretrained(self, path: str | Path) -> None:
        """Write the tokenizer's files, preprocessor_config.json and processor_config.json."""
        path, kind = Path(path), {"processor_class": "Blip2Processor"}
        self.tokenizer.save_pretrained(path)
        write_json(path / "preprocessor_config.json", self.image.to_dict() | kind)
        count = None if self.image_token_id is None else self.num_query_tokens
        write_json(path / "processor_config.json", {"num_query_tokens": count} | kind)

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        images: Any = None,
        *,
        max_length: int | None = None,
        padding_side: str | None = None,
    ) -> dict[str, Tensor]:
        """Model arguments for images, texts or both.

        Args:
            text: one or many, each about one image, in order; the tokenizer puts its special tokens
                around it. Without one the model describes the images.
            images: one or many (vlmkernels.models.images.load_rgb).
            max_length: cut a text to so many tokens; the last one, its end, stays.
            padding_side: "left" or "right", of the whole row; the tokenizer's by default.

        Returns:
            input_ids, attention_mask (num_texts, seqlen) int64; pixel_values (num_images, 3,
            height, width) float32.

        Raises:
            ValueError: neither text nor images, or an image that cannot be read.
        """
        out: dict[str, Tensor] = {}
        if text is not None:
            rows = [self._encode(t, max_length) for t in as_texts(text)]
            out |= self.tokenizer.pad(rows, padding_side)
        if images is not None:
            out["pixel_values"] = self.image(images)
        if not out:
            raise ValueError("text: expected text, images or both, got neither")
        return out

    def _encode(self, text: str, max_length: int | None) -> list[int]:
        ids = self.tokenizer.encode(text, add_special_tokens=True)
        if max_length is not None and len(ids) > max_length:
            ids = ids[: max_length - 1] + ids[-1:]
        if self.image_token_id is None:
            return ids
        return [self.image_token_id] * self.num_query_tokens + ids
