"""Conversations in LLaVA's JSON with a folder of images, and the order in which they are seen."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader

from vlmkernels.models.checkpoint import Json
from vlmkernels.models.fields import OBJECT, TEXT, Kind, expect

from . import ranks
from .settings import Settings
from .trainer import Batch

T = TypeVar("T")
PATHS = Kind("a path or several", lambda x: isinstance(x, list) and all(map(TEXT.holds, x)))
IMAGE = "<image>"
ROLES = {"system": "system", "human": "user", "gpt": "assistant"}


def read_conversations(file: Path, images: Path) -> list[list[Json]]:
    """Messages, as of `ChatProcessor.from_messages`, of every record of a LLaVA data file:

    [{"image": "a/b.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
    {"from": "gpt", "value": "A cat."}]}, ...]

    "image", a path in the folder `images` or several, is left out where there is none. As in the
    original code pictures go in front of their turn, and turns before the first human one go.

    Raises:
        ValueError: naming the record: another form, an image that is not there, placeholders and
            images that do not match, no answer.
    """
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"data: expected a JSON file, found none at {file}") from error
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON: {error}") from error
    if not isinstance(records, list) or not records:
        raise ValueError(f"{file}: expected a list of records, got {records!r:.80}")
    return [_messages(f"{file}[{i}]", record, images) for i, record in enumerate(records)]


def _messages(name: str, record: Any, images: Path) -> list[Json]:
    expect(name, record, OBJECT)
    turns, paths = record.get("conversations"), record.get("image") or []
    if not isinstance(turns, list):
        raise ValueError(f"{name}['conversations']: expected a list, got {turns!r:.80}")
    paths = [paths] if isinstance(paths, str) else paths
    files = [images / path for path in expect(f"{name}['image']", paths, PATHS)]
    for path in files:
        if not path.is_file():
            raise ValueError(f"{name}: expected an image file, found none at {path}")
    messages: list[Json] = []
    left = iter(files)
    for i, turn in enumerate(turns):
        place = f"{name}['conversations'][{i}]"
        who, text = expect(place, turn, OBJECT).get("from"), turn.get("value")
        if who not in ROLES or not isinstance(text, str):
            raise ValueError(f"{place}: expected from {[*ROLES]} and a value, got {turn!r:.80}")
        if not messages and who == "gpt":
            continue
        count = text.count(IMAGE) if who == "human" else 0
        shown = [{"type": "image", "image": str(path)} for path in islice(left, count)]
        if len(shown) < count:
            raise ValueError(f"{name}: expected {IMAGE} once for each image, got more")
        said = {"type": "text", "text": text.replace(IMAGE, "").strip()}
        messages.append({"role": ROLES[who], "content": [*shown, said] if shown else text})
    if next(left, None) is not None:
        raise ValueError(f"{name}: expected {IMAGE} once for each image, got fewer")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{name}: expected an answer, got none")
    return messages


def deal(num_examples: int, seed: int, start: int) -> Iterator[int]:
    """Every example once in random order, then again in another: without end, from `start` on."""
    epoch, place = divmod(start, num_examples)
    while True:
        generator = torch.Generator().manual_seed(hash((seed, epoch)) % 2**63)
        yield from torch.randperm(num_examples, generator=generator)[place:].tolist()
        epoch, place = epoch + 1, 0


class Batches:
    """This rank's micro-batches of every step, collated by worker processes ahead of time.

    A step's examples follow from its number, whatever the number of ranks.
    """

    def __init__(
        self,
        examples: Sequence[T],
        collate: Callable[[Sequence[T]], Batch],
        settings: Settings,
        workers: int = 0,
    ) -> None:
        share, left = divmod(settings.batch, ranks.world_size())
        size = min(settings.micro_batch or share, share)
        if left or share % size:
            raise ValueError(
                f"batch: expected a multiple of micro_batch {size} on each of "
                f"{ranks.world_size()} ranks, got {settings.batch}"
            )
        self.examples, self.collate, self.settings = examples, collate, settings
        self.size, self.workers = size, workers

    def __call__(self, step: int) -> Iterator[list[Batch]]:
        """From this step on."""
        loader: Any = DataLoader(
            self.examples,  # type: ignore[arg-type]
            batch_sampler=self.indices(step),
            collate_fn=self.collate,
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
        )
        coming = iter(loader)
        count = self.settings.batch // (self.size * ranks.world_size())
        for _ in range(step, self.settings.steps):
            yield [next(coming) for _ in range(count)]

    def indices(self, step: int) -> Iterator[list[int]]:
        """Of the examples of each micro-batch."""
        batch = self.settings.batch
        dealt = deal(len(self.examples), self.settings.seed, step * batch)
        for _ in range(step, self.settings.steps):
            mine = [next(dealt) for _ in range(batch)][ranks.rank() :: ranks.world_size()]
            for first in range(0, len(mine), self.size):
                yield mine[first : first + self.size]
