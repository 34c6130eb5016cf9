"""Records of LLaVA's JSON, and the order in which they are seen."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vlmkernels.recipes.data import Batches, deal, read_conversations
from vlmkernels.recipes.settings import Settings
from vlmkernels.recipes.trainer import Batch

HUMAN, GPT = {"from": "human", "value": "What is this?"}, {"from": "gpt", "value": "A cat."}


def read(folder: Path, *records: Any) -> list[list[dict[str, Any]]]:
    (folder / "data.json").write_text(json.dumps(records))
    return read_conversations(folder / "data.json", folder)


def test_messages(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    shown = {"from": "human", "value": "<image>\n<image>\nWhich is larger?"}
    found = read(
        tmp_path,
        {"image": ["a.png", "b.png"], "conversations": [shown, GPT, HUMAN, GPT]},
        {"conversations": [GPT, {"from": "system", "value": "Be brief."}, HUMAN, GPT]},
    )
    pictures = [{"type": "image", "image": str(tmp_path / name)} for name in ("a.png", "b.png")]
    question = {"role": "user", "content": "What is this?"}
    answer = {"role": "assistant", "content": "A cat."}
    text = {"type": "text", "text": "Which is larger?"}
    assert found == [
        [{"role": "user", "content": [*pictures, text]}, answer, question, answer],
        [{"role": "system", "content": "Be brief."}, question, answer],  # no answer comes first
    ]


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    shown = {"from": "human", "value": "<image>"}
    for record, message in (
        ([], r"json\[0\]: expected an object, got \[\]"),
        ({}, r"\['conversations'\]: expected a list, got None"),
        ({"conversations": [{"from": "me", "value": ""}]}, r"\[0\]: expected from \['system',"),
        ({"conversations": [{"from": "human"}]}, r"\[0\]: expected from .* and a value"),
        ({"conversations": [HUMAN]}, r"json\[0\]: expected an answer, got none"),
        ({"image": "b.png", "conversations": [shown, GPT]}, "expected an image file, found none"),
        ({"image": 3, "conversations": [shown, GPT]}, r"\['image'\]: expected a path or several"),
        ({"conversations": [shown, GPT]}, "expected <image> once for each image, got more"),
        ({"image": "a.png", "conversations": [HUMAN, GPT]}, "once for each image, got fewer"),
    ):
        with pytest.raises(ValueError, match=message):
            read(tmp_path, record)
    (tmp_path / "data.json").write_text("[")
    for file, message in (("data.json", "expected JSON"), ("other.json", "found none at")):
        with pytest.raises(ValueError, match=message):
            read_conversations(tmp_path / file, tmp_path)
    with pytest.raises(ValueError, match="expected a list of records, got"):
        read(tmp_path)


def test_every_example_comes_once_an_epoch_from_any_place_on() -> None:
    whole = list(islice(deal(5, 0, 0), 15))
    assert all(Counter(whole[i : i + 5]) == Counter(range(5)) for i in (0, 5, 10))
    assert whole[:5] != whole[5:10] and whole != list(islice(deal(5, 1, 0), 15))
    for start in (3, 5, 12):
        assert list(islice(deal(5, 0, start), 3)) == whole[start : start + 3]


def collate(numbers: Any) -> Batch:
    return {"numbers": torch.tensor(list(numbers))}


def test_worker_processes_change_nothing() -> None:
    settings = Settings(steps=5, batch=4, lr=1.0, micro_batch=2)
    here, there = (Batches(range(7), collate, settings, workers) for workers in (0, 1))
    expected = [[batch["numbers"].tolist() for batch in step] for step in here(2)]
    assert [[len(batch) for batch in step] for step in expected] == [[2, 2]] * 3
    assert [n for step in expected for batch in step for n in batch] == list(
        islice(deal(7, 0, 8), 12)
    )
    assert [[batch["numbers"].tolist() for batch in step] for step in there(2)] == expected
