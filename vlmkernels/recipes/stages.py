"""A stage of a published recipe: what moves, with which settings, on what."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from vlmkernels.models import load_processor, model_class
from vlmkernels.models.chat import pictures_of
from vlmkernels.models.checkpoint import Json
from vlmkernels.models.pretrained import Pretrained
from vlmkernels.models.supervised import TemplateProcessor

from . import ranks
from .data import Batches, read_conversations
from .settings import Settings, read_settings
from .trainer import Batch, NextToken, Objective, Trainer

Conversation = Sequence[Json]


@dataclass(frozen=True)
class StageSettings(Settings):
    """With what is said about rows."""

    max_length: int = 2048  # tokens of a row (BLIP-2: of a text); a picture is never cut


class Collate(Protocol):
    def __call__(
        self, processor: Any, conversations: Sequence[Conversation], settings: StageSettings
    ) -> Batch:
        """Model arguments with labels."""


@dataclass(frozen=True)
class Stage:
    """published: fields of StageSettings."""

    does: str
    model: type[Pretrained]
    published: Mapping[str, Any]
    collate: Collate
    objective: Objective = field(default_factory=NextToken)
    captions: bool = False  # every example has one picture
    prepare: Callable[[Any], None] = lambda processor: None  # how it writes conversations


@dataclass(frozen=True)
class StageRun:
    """A stage on a checkpoint and a data file; `finish` writes what it made."""

    trainer: Trainer
    processor: Any

    @classmethod
    def start(
        cls,
        stage: Stage,
        model: Path,
        data: Path,
        images: Path,
        out: Path,
        *,
        config: Path | None = None,
        workers: int = 0,
        resume: bool = False,
    ) -> StageRun:
        """ValueError, before weights are read, for what does not fit together."""
        if not issubclass(kind := model_class(model), stage.model):
            raise ValueError(f"model: expected {stage.model.__name__}, got {kind.__name__}")
        processor = load_processor(model)
        stage.prepare(processor)
        examples = read_conversations(data, images)
        for example in examples if stage.captions else ():
            only_picture(example)
        settings = read_settings(StageSettings, stage.published, config, len(examples))
        share = settings.batch // ranks.world_size()
        if not stage.objective.splits and (settings.micro_batch or share) < share:
            raise ValueError(
                f"micro_batch: expected a rank's whole share {share}, since parts of a batch have "
                f"another loss, got {settings.micro_batch}"
            )
        if not stage.objective.splits and settings.batch > len(examples):
            raise ValueError(
                f"batch: expected at most the {len(examples)} examples, which would be their own "
                f"negatives, got {settings.batch}"
            )
        collate = partial(stage.collate, processor, settings=settings)
        trainer = Trainer(
            lambda: ranks.load_on_first(model),
            settings,
            out,
            Batches(examples, collate, settings, workers),
            objective=stage.objective,
            device=ranks.device(),
            resume=resume,
            origin={"stage": stage.does, "data": zlib.crc32(data.read_bytes())},
        )
        return cls(trainer, processor)

    def finish(self) -> None:
        """Makes the folder a checkpoint."""
        if ranks.rank() == 0:
            self.processor.save_pretrained(self.trainer.out)
        self.trainer.export()


def conversation_batch(
    processor: TemplateProcessor,
    conversations: Sequence[Conversation],
    settings: StageSettings,
    **options: Any,
) -> Batch:
    """Labels on the answers. Without any picture a row with a blank one and no label is added, so
    that every rank runs the same layers."""
    rows = list(conversations)
    if not any(pictures_of(row, kind) for row in rows for kind in ("image", "video")):
        blank = {"type": "image", "image": Image.new("RGB", (28, 28))}
        rows.append([{"role": "user", "content": [blank]}])
    batch = processor.for_training(rows, padding_side="right", **options)
    return cut(batch, settings.max_length, processor.feature_ids)


def cut(batch: Batch, max_length: int, feature_ids: Sequence[int]) -> Batch:
    """Right-padded rows of at most so many tokens; ValueError if that would cut a picture."""
    beyond = batch["input_ids"][:, max_length:]
    if torch.isin(beyond, torch.tensor(feature_ids)).any():
        length = batch["input_ids"].shape[1]
        raise ValueError(
            f"max_length: expected enough for the pictures of a row, got {max_length} "
            f"for a row of {length}"
        )
    rows = ("input_ids", "attention_mask", "labels")
    return {name: x[:, :max_length] if name in rows else x for name, x in batch.items()}


def answer_of(messages: Conversation) -> str:
    """The first thing said by the assistant: a caption."""
    return next(str(m["content"]) for m in messages if m["role"] == "assistant")


def only_picture(messages: Conversation) -> Any:
    """The picture of an example that must have one."""
    pictures = pictures_of(messages, "image")
    if len(pictures) != 1:
        raise ValueError(f"data: expected one image for each caption, got {len(pictures)}")
    return pictures[0]
