"""What the processors of chat models share: conversations, and placeholders that grow."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vlmkernels.models.checkpoint import Json, read_json
from vlmkernels.models.fields import OBJECT, expect
from vlmkernels.models.tokenizer import Tokenizer


class ChatProcessor:
    """A processor that is called with text and the pictures for its placeholders."""

    tokenizer: Tokenizer

    def apply_chat_template(self, messages: Sequence[Json], **options: Any) -> str:
        return self.tokenizer.apply_chat_template(messages, **options)

    def from_messages(self, messages: Sequence[Json], **options: Any) -> dict[str, Tensor]:
        """Model arguments for a conversation whose content holds the pictures themselves.

        messages: [{"role": "user", "content": [{"type": "image", "image": x}, {"type": "text",
        "text": t}]}, ...], as in transformers and qwen-vl-utils.
        """
        parts = [p for m in messages if not isinstance(m["content"], str) for p in m["content"]]
        images = [p["image"] for p in parts if "image" in p]
        if videos := [p["video"] for p in parts if "video" in p]:
            options["videos"] = videos
        prepare: Any = self
        arguments: dict[str, Tensor] = prepare(
            self.apply_chat_template(messages), images, **options
        )
        return arguments


def read_processor(path: Path) -> tuple[Json, Json]:
    """processor_config.json, empty where there is none, and the image settings: in a file of
    their own, else in there."""
    own, image = (
        read_json(path / name) if (path / name).is_file() else {}
        for name in ("processor_config.json", "preprocessor_config.json")
    )
    return own, image or expect("image_processor", own.get("image_processor") or {}, OBJECT)


def as_texts(text: str | Sequence[str]) -> list[str]:
    """One text or many as a list."""
    texts = [text] if isinstance(text, str) else list(text)
    if not texts:
        raise ValueError("text: expected at least one, got none")
    return texts


def grow(texts: list[str], counts: Mapping[str, Sequence[int]]) -> list[str]:
    """Every placeholder repeated as often as `counts` says for it, in order over all texts.

    Raises ValueError unless there is one placeholder for each picture.
    """
    left = {token: iter(numbers) for token, numbers in counts.items()}
    for token, numbers in counts.items():
        found = sum(t.count(token) for t in texts)
        if found != len(numbers):
            raise ValueError(f"text: expected {len(numbers)} {token} (one each), got {found}")
    pattern = re.compile("|".join(re.escape(token) for token in counts))
    return [pattern.sub(lambda match: match[0] * next(left[match[0]]), t) for t in texts]
