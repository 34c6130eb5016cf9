"""BLIP-2 processor: images and texts in, model arguments out; Pillow and numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vlmkernels.models.chat import ChatProcessor, as_texts, read_processor
from vlmkernels.models.checkpoint import write_json
from vlmkernels.models.fields import COUNT, expect
from vlmkernels.models.pixels import ImageSettings, as_list
from vlmkernels.models.tokenizer import Tokenizer

from .weights import read_config

# How the paper asks (appendix) and LAVIS goes on asking; a turn with nothing but an image asks for
# its caption.
QUESTION_ANSWER = (
    "{% for message in messages %}"
    "{% if message['content'] is string %}{% set text = message['content'] %}"
    "{% else %}{% set text = message['content'] | selectattr('type', 'equalto', 'text')"
    " | map(attribute='text') | join(' ') %}{% endif %}"
    "{% if message['role'] == 'system' %}"
    "{{ raise_exception('messages: expected user and assistant, got system') }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + (text | trim) + '. ' }}"
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
        config = read_config(path)
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
            max_length: cut a text to so many tokens; special tokens behind it stay.
            padding_side: "left" or "right", of the whole row; the tokenizer's by default.

        Returns:
            input_ids, attention_mask (num_texts, seqlen) int64; pixel_values (num_images, 3,
            height, width) float32.

        Raises:
            ValueError: neither text nor images, an image that cannot be read, or not one for each
                text that has placeholders.
        """
        out: dict[str, Tensor] = {}
        texts, pictures = [] if text is None else as_texts(text), as_list(images)
        paired = texts and images is not None and self.image_token_id is not None
        if paired and len(pictures) != len(texts):
            raise ValueError(
                f"images: expected {len(texts)} (one for each text or conversation), "
                f"got {len(pictures)}"
            )
        if texts:
            rows = [self._encode(t, max_length) for t in texts]
            out |= self.tokenizer.pad(rows, padding_side)
        if pictures:
            out["pixel_values"] = self.image(pictures)
        if not out:
            raise ValueError("text: expected text, images or both, got neither")
        return out

    def _encode(self, text: str, max_length: int | None) -> list[int]:
        ids = self.tokenizer.encode(text, add_special_tokens=True)
        if max_length is not None and len(ids) > expect("max_length", max_length, COUNT):
            words = self.tokenizer.encode(text)
            begins = range(len(ids) - len(words) + 1)
            begin = next(i for i in begins if ids[i : i + len(words)] == words)
            end = ids[begin + len(words) :]
            ids = (ids[: max(0, max_length - len(end))] + end)[:max_length]
        if self.image_token_id is None:
            return ids
        return [self.image_token_id] * self.num_query_tokens + ids
