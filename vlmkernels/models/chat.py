"""What chat models share: conversations, and placeholders that grow."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vlmkernels.models.checkpoint import Json, read_json
from vlmkernels.models.fields import OBJECT, TEXT, expect
from vlmkernels.models.generation import Generates, stream_text
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

        Raises:
            ValueError: what is not of this form, by its place.
        """
        expect_messages(messages)
        images = pictures_of(messages, "image")
        if videos := pictures_of(messages, "video"):
            options["videos"] = videos
        prepare: Any = self
        arguments: dict[str, Tensor] = prepare(
            self.apply_chat_template(messages), images, **options
        )
        return arguments


def expect_messages(messages: Any) -> None:
    """ValueError unless these are messages of a role, with a text or with parts, each an image, a
    video or a text: a template passes over what it does not know."""
    if not isinstance(messages, (list, tuple)):
        raise ValueError(f"messages: expected a list, got {messages!r:.80}")
    if not messages:
        raise ValueError("messages: expected at least one, got none")
    for i, message in enumerate(messages):
        name = f"messages[{i}]"
        expect(name, message, OBJECT)
        expect(f"{name}['role']", message.get("role"), TEXT)
        content = message.get("content")
        if isinstance(content, str):
            continue
        if not isinstance(content, (list, tuple)):
            raise ValueError(f"{name}['content']: expected a text or parts, got {content!r:.80}")
        for j, part in enumerate(content):
            if not isinstance(part, dict) or not part.keys() & {"image", "video", "text"}:
                known = "an image, a video or a text"
                raise ValueError(f"{name}['content'][{j}]: expected {known}, got {part!r:.80}")


def pictures_of(messages: Sequence[Json], kind: str) -> list[Any]:
    """What the parts of messages hold under "image" or "video", in order."""
    parts = (p for m in messages if not isinstance(m["content"], str) for p in m["content"])
    return [part[kind] for part in parts if kind in part]


def read_processor(path: Path) -> tuple[Json, Json]:
    """processor_config.json, empty where there is none, and the image settings: in a file of
    their own, else in there."""
    own, image = (
        read_json(path / name) if (path / name).is_file() else {}
        for name in ("processor_config.json", "preprocessor_config.json")
    )
    return own, image or expect("image_processor", own.get("image_processor") or {}, OBJECT)


class Chat:
    """A conversation that remembers what was said: `messages`, as of `from_messages`."""

    def __init__(
        self, model: Generates[Any], processor: ChatProcessor, system: str | None = None
    ) -> None:
        self.model, self.processor = model, processor
        self.messages: list[Json] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})

    def stream(self, text: str, images: Sequence[Any] = (), **options: Any) -> Iterator[str]:
        """The answer to a question about images and all that was said, as it is made.

        options: as of `generate`. What is asked is remembered once its answer is complete.
        """
        content: list[Json] = [{"type": "image", "image": image} for image in images]
        question = {"role": "user", "content": [*content, {"type": "text", "text": text}]}
        inputs = self.processor.from_messages([*self.messages, question])
        tensors: dict[str, Any] = {name: x.to(self.model.device) for name, x in inputs.items()}
        answer = ""
        tokenizer = self.processor.tokenizer
        steps = self.model.generate_steps(**tensors, tokenizer=tokenizer, **options)
        for piece in stream_text(tokenizer, steps):
            answer += piece
            yield piece
        reply = {"type": "text", "text": answer}
        self.messages += [question, {"role": "assistant", "content": [reply]}]

    def ask(self, text: str, images: Sequence[Any] = (), **options: Any) -> str:
        """`stream` at once."""
        return "".join(self.stream(text, images, **options))

    def last_image(self) -> Any:
        """The picture that was shown last; None without one."""
        return (pictures_of(self.messages, "image") or [None])[-1]


def as_texts(text: str | Sequence[str]) -> list[str]:
    """One text or many as a list."""
    many = isinstance(text, Iterable) and not isinstance(text, str)
    texts: list[Any] = list(text) if many else [text]
    if not all(isinstance(each, str) for each in texts):
        raise TypeError(f"text: expected a string or several, got {text!r:.80}")
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
