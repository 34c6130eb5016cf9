"""Qwen-VL processor: conversations and images in, model arguments out; Pillow and numpy only."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from vlmkernels.models.chat import ChatProcessor, as_texts, expect_messages
from vlmkernels.models.checkpoint import CONFIG, GENERATION_CONFIG, Json, read_json, write_json
from vlmkernels.models.fields import COUNT, expect
from vlmkernels.models.pixels import ImageSettings, as_list
from vlmkernels.models.pretrained import read_generation_config

from .config import QwenVLConfig
from .tokenizer import (
    END_OF_TEXT,
    GROUNDING,
    IM_END,
    IM_START,
    IMAGE_TAGS,
    IMG_END,
    IMG_START,
    QwenTokenizer,
)

SYSTEM = "You are a helpful assistant."
CHAT_FORMATS = ("chatml", "raw")
CHAT_OPTIONS = ("chat_format", "max_window_size")  # of the processor, in generation_config.json
_IMAGE = re.compile(f"{IMG_START}(.*?){IMG_END}", re.DOTALL)


class Message(NamedTuple):
    role: str
    text: str
    images: Sequence[Any] = ()


@dataclass
class QwenImageSettings(ImageSettings):
    """The whole image squashed to a square, bicubic; CLIP's mean and standard deviation."""

    size: int | tuple[int, int] = (448, 448)
    do_center_crop: bool = False


class QwenVLProcessor(ChatProcessor):
    """Turns text with <img>path</img> and the images for it into tensors.

    chat_format: "chatml" (Qwen-VL-Chat), or "raw" (Qwen-VL), whose prompt is the text alone.
    max_window_size: the oldest turns of a longer conversation are left out.
    """

    tokenizer: QwenTokenizer

    def __init__(
        self,
        tokenizer: QwenTokenizer,
        image: ImageSettings | None = None,
        *,
        chat_format: str = "chatml",
        max_window_size: int = 6144,
    ) -> None:
        if chat_format not in CHAT_FORMATS:
            raise ValueError(f"chat_format: expected one of {CHAT_FORMATS}, got {chat_format!r}")
        self.tokenizer, self.image = tokenizer, image or QwenImageSettings()
        self.chat_format = chat_format
        self.max_window_size: int = expect("max_window_size", max_window_size, COUNT)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> QwenVLProcessor:
        """From a checkpoint directory: qwen.tiktoken, config.json and generation_config.json."""
        path = Path(path)
        visual = QwenVLConfig.from_dict(read_json(path / CONFIG)).visual
        generation = read_generation_config(path)
        return cls(
            QwenTokenizer.from_pretrained(path, num_slots=visual.n_queries),
            QwenImageSettings(size=(visual.image_size, visual.image_size)),
            chat_format=generation.get("chat_format", "raw"),
            max_window_size=generation.get("max_window_size", 6144),
        )

    def save_pretrained(self, path: str | Path) -> None:
        """Write the tokenizer's files and, into generation_config.json, CHAT_OPTIONS; the rest is
        in the model's config.json."""
        path = Path(path)
        self.tokenizer.save_pretrained(path)
        options = {name: getattr(self, name) for name in CHAT_OPTIONS}
        write_json(path / GENERATION_CONFIG, read_generation_config(path) | options)

    def __call__(
        self, text: str | Sequence[str], images: Any = None, *, padding_side: str | None = None
    ) -> dict[str, Tensor]:
        """Model arguments for one text or a batch.

        Args:
            text: special tokens written in it count as such. Each <img>path</img> stands for one
                image, in order.
            images: one or many (vlmkernels.models.images.load_rgb), for the whole batch in order;
                None: the files whose paths stand in the text.
            padding_side: "left" or "right"; left by default.

        Returns:
            input_ids, attention_mask (batch, seqlen) int64; with images pixel_values (num_images,
            3, size, size) float32.

        Raises:
            ValueError: an image that cannot be read, tags and images that do not match.
        """
        texts = as_texts(text)
        found = [path for t in texts for path in image_paths(t)]
        rows = [self.tokenizer.encode(t) for t in texts]
        given = found if images is None else as_list(images)
        if len(given) != len(found):
            raise ValueError(
                f"text: expected {len(given)} {IMG_START} (one each), got {len(found)}"
            )
        return self._arguments(rows, given, padding_side)

    def from_messages(self, messages: Sequence[Json], **options: Any) -> dict[str, Tensor]:
        """Model arguments for a conversation: [{"role": "user", "content": "text"}, ...].

        Content is text, or a list of {"type": "image", "image": x} and {"type": "text", "text": t};
        images are numbered as in training: "Picture 1: <img>...</img>". Before it may stand a
        message of the role "system". A turn of the user comes last.

        Only tags of images and boxes count as special in it: <|im_end|> is text like any other,
        so that no content can end its own turn.
        """
        expect_messages(messages)
        rows, images = self.prompt(messages)
        return self._arguments([rows], images, **options)

    def for_training(
        self, conversations: Sequence[Sequence[Json]], *, padding_side: str | None = None
    ) -> dict[str, Tensor]:
        """Model arguments for a batch of whole conversations, each as of `from_messages` with an
        answer at the end; none of them is cut to the window.

        `labels` (batch, seqlen), -100 where there is nothing to learn, are those of the original
        code: answers, and of every turn <|im_start|>, <|im_end|> and the line's end. In "raw"
        format: a question, its answer and <|endoftext|>, and labels on the last two.

        Raises:
            ValueError: as `from_messages`.
        """
        rows: list[list[int]] = []
        labels: list[list[int]] = []
        images: list[Any] = []
        for messages in conversations:
            expect_messages(messages)
            system, turns = self._turns(messages, answered=True)
            told = [message for turn in turns for message in turn]
            parts = self._chat_parts([system, *told])
            if self.chat_format == "raw":
                parts = self._raw_parts(told)
            rows.append([i for ids, _ in parts for i in ids])
            labels.append(
                [i for ids, learnt in parts for i in (ids if learnt else [-100] * len(ids))]
            )
            images += [image for message in [system, *told] for image in message.images]
        batch = self._arguments(rows, images, padding_side)
        marks = self.tokenizer.pad(labels, padding_side)["input_ids"]
        return batch | {"labels": marks.masked_fill(batch["attention_mask"] == 0, -100)}

    def _chat_parts(self, messages: Sequence[Message]) -> list[tuple[list[int], bool]]:
        """Token ids, and whether they are learnt."""
        newline, parts = self.tokenizer.encode("\n"), []
        for message in messages:
            start, *middle, end = self._encode(message)
            role = len(self.tokenizer.encode(message.role + "\n"))
            parts += [([start], True), (middle[:role], False)]
            parts += [(middle[role:], message.role == "assistant"), ([end, *newline], True)]
        return parts

    def _raw_parts(self, messages: Sequence[Message]) -> list[tuple[list[int], bool]]:
        if len(messages) != 2:
            raise ValueError(f"messages: expected two without chat, got {len(messages)}")
        question, answer = messages
        learnt = self.tokenizer.encode(answer.text, allowed_special=GROUNDING)
        end = self.tokenizer.special[END_OF_TEXT]
        return [(self.tokenizer.encode(question.text), False), ([*learnt, end], True)]

    def prompt(self, messages: Sequence[Json]) -> tuple[list[int], list[Any]]:
        """The token ids and the images of a conversation, without what exceeds the window."""
        system, turns = self._turns(messages)
        if self.chat_format == "raw":
            if len(messages) > 1:
                raise ValueError(f"messages: expected one without chat, got {len(messages)}")
            return self.tokenizer.encode(turns[0][0].text), [*turns[0][0].images]
        newline = self.tokenizer.encode("\n")
        ids = [[i for m in turn for i in newline + self._encode(m)] for turn in turns]
        head = self._encode(system)
        first, size = len(turns) - 1, len(head)  # the last turn, the question, always stays
        while first and size + len(ids[first - 1]) < self.max_window_size:
            first -= 1
            size += len(ids[first])
        start = [self.tokenizer.special[IM_START], *self.tokenizer.encode("assistant"), *newline]
        tokens = [*head, *(i for turn in ids[first:] for i in turn), *newline, *start]
        kept = [system, *(message for turn in turns[first:] for message in turn)]
        return tokens, [image for message in kept for image in message.images]

    def apply_chat_template(self, messages: Sequence[Json], **_: Any) -> str:
        """The conversation as text, to look at; `from_messages` makes the tokens."""
        return self.tokenizer.decode(self.prompt(messages)[0], skip_special_tokens=False)

    def _encode(self, message: Message) -> list[int]:
        encode, special = self.tokenizer.encode, self.tokenizer.special
        # An answer shows no image: a model that writes <img> must not open a file.
        allowed = GROUNDING if message.role == "assistant" else IMAGE_TAGS
        content = encode(message.text, allowed_special=allowed)
        role = encode(message.role + "\n")
        return [special[IM_START], *role, *content, special[IM_END]]

    def _arguments(
        self, rows: Sequence[list[int]], images: Sequence[Any], padding_side: str | None = None
    ) -> dict[str, Tensor]:
        pixels = {"pixel_values": self.image(images)} if images else {}
        return self.tokenizer.pad(rows, padding_side) | pixels

    def _turns(
        self, messages: Sequence[Json], answered: bool = False
    ) -> tuple[Message, list[list[Message]]]:
        """The system's message, and what belongs together: a question and the answer to it.

        answered: whether the last question is.
        """
        system, count = Message("system", SYSTEM), 0
        turns: list[list[Message]] = []
        for i, raw in enumerate(messages):
            message = self._read(raw, count)
            count += len(message.images)
            if message.role == "system" and i == 0:
                system = message
            elif message.role == "user" and (not turns or len(turns[-1]) == 2):
                turns.append([message])
            elif message.role == "assistant" and turns and len(turns[-1]) == 1:
                turns[-1].append(message)
            else:
                raise ValueError(
                    f"messages: expected user and assistant by turns, got {message.role!r} at {i}"
                )
        if not turns or len(turns[-1]) != 1 + answered:
            last = "assistant" if answered else "user"
            raise ValueError(
                f"messages: expected the {last}'s turn at the end, got another or none"
            )
        return system, turns

    def _read(self, raw: Json, count: int) -> Message:
        """`count`: how many pictures came before."""
        content, answer = raw["content"], raw["role"] == "assistant"
        if isinstance(content, str):
            return Message(raw["role"], content, [] if answer else image_paths(content))
        text = ""
        images: list[Any] = []
        for part in content:
            if "image" in part:
                images.append(part["image"])
                text += f"Picture {count + len(images)}: {self._tagged(images[-1])}\n"
            elif "text" in part:
                images += [] if answer else image_paths(part["text"])
                text += part["text"]
            else:
                raise ValueError(f"messages: expected an image or a text, got {sorted(part)}")
        return Message(raw["role"], text, images)

    def _tagged(self, image: Any) -> str:
        """<img>path</img>, as the published code has it, where there is a path that fits."""
        empty = IMG_START + IMG_END
        if not isinstance(image, (str, Path)):
            return empty
        path = unicodedata.normalize("NFC", str(image))
        tagged = f"{IMG_START}{path}{IMG_END}"
        try:
            self.tokenizer.encode(tagged)
        except ValueError:
            return empty
        return tagged if image_paths(tagged) == [path] else empty


def image_paths(text: str) -> list[str]:
    """What stands between <img> and </img>, as the tokenizer sees it."""
    paths: list[str] = _IMAGE.findall(unicodedata.normalize("NFC", text))
    return paths
