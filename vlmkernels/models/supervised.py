"""Conversations to learn from: model arguments with labels on what the assistant says."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmkernels.models.chat import ChatProcessor, expect_messages, pictures_of
from vlmkernels.models.checkpoint import Json


class TemplateProcessor(ChatProcessor):
    """A processor that writes conversations by a chat template, with tokens to be replaced by
    features in it."""

    adds_special_tokens: ClassVar[bool]  # around every text: LLaMA's start

    @property
    @abstractmethod
    def feature_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that pictures grow to."""

    def for_training(
        self, conversations: Sequence[Sequence[Json]], **options: Any
    ) -> dict[str, Tensor]:
        """Model arguments for a batch of whole conversations, each as of `from_messages`.

        options: as of a call. `labels` (batch, seqlen) holds the ids of every answer and of the
        token with which the template ends it, and -100 on all else: system and user, the words
        around each turn, pictures, padding. No row is cut, however long it is.

        Raises:
            ValueError: as `from_messages`; so too for a template that writes a turn in another way
                when more turns follow.
        """
        texts: list[str] = []
        marks: list[bool] = []  # of every token but those of pictures, row after row
        images, videos = [], []
        for messages in conversations:
            expect_messages(messages)
            texts.append(self.apply_chat_template(messages, add_generation_prompt=False))
            marks += self._marks(texts[-1], list(self._answers(messages, texts[-1])))
            images += pictures_of(messages, "image")
            videos += pictures_of(messages, "video")
        prepare: Any = self
        batch: dict[str, Tensor] = prepare(
            texts, images, **({"videos": videos} if videos else {}), **options
        )
        ids = batch["input_ids"]
        words = (batch["attention_mask"] != 0) & ~torch.isin(ids, torch.tensor(self.feature_ids))
        counts = torch.zeros_like(words).masked_scatter(words, torch.tensor(marks))
        return {**batch, "labels": ids.masked_fill(~counts, -100)}

    def _answers(self, messages: Sequence[Json], text: str) -> Iterator[tuple[int, int]]:
        """Where in `text` the answers begin and end, each with what the template ends it with."""
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.apply_chat_template(messages[:i])
            until = self.apply_chat_template(messages[: i + 1], add_generation_prompt=False)
            if not (text.startswith(until) and until.startswith(before)):
                raise ValueError(
                    "chat template: expected one that writes a turn alike whatever follows, "
                    f"got another text up to messages[{i}]"
                )
            yield len(before), len(until.rstrip())

    def _marks(self, text: str, answers: Sequence[tuple[int, int]]) -> list[bool]:
        """Whether each token but those of pictures lies in an answer."""
        found = self.tokenizer.backend.encode(text, add_special_tokens=self.adds_special_tokens)
        return [
            any(first <= start < end <= last for first, last in answers)
            for token, (start, end) in zip(found.ids, found.offsets, strict=True)
            if token not in self.feature_ids
        ]
