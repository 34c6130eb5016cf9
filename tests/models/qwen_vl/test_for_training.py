"""Which tokens of a conversation carry loss: those that the original code counts."""

from typing import Any

import pytest

from tests.models.common import picture
from tests.models.qwen_vl.conftest import NUM_SLOTS
from vlmkernels.models.qwen_vl import QwenVLProcessor

TURNS = [("the picture shows", "a dog and two cats"), ("图中有?", "一只狗")]


def conversation(count: int, image: Any = None) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for question, answer in TURNS[:count]:
        shown = [{"type": "image", "image": image}] if image is not None and not messages else []
        content = [*shown, {"type": "text", "text": question}]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return messages


def preprocess(processor: QwenVLProcessor, turns: list[tuple[str, str]]) -> tuple[list[int], ...]:
    """The original's ids and mask (finetune.py), transcribed."""
    encode, special = processor.tokenizer.encode, processor.tokenizer.special
    start, end, newline = [special["<|im_start|>"]], [special["<|im_end|>"]], encode("\n")
    ignored = -100
    system = start + encode("system") + newline + encode("You are a helpful assistant.")
    ids = system + end + newline
    target = start + [ignored] * (len(ids) - 3) + end + newline
    for turn in turns:
        for role, text in zip(("user", "assistant"), turn, strict=True):
            head = start + encode(role)
            told = head + newline + encode(text) + end + newline
            ids += told
            if role == "user":
                target += start + [ignored] * (len(told) - 3) + end + newline
            else:
                # The line's end after the role is one of those that are ignored.
                answer = told[len(head) + 1 : -2]
                target += start + [ignored] * len(head) + answer + end + newline
    return ids, target


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_are_the_original_codes(side: str, processor: QwenVLProcessor) -> None:
    batch = processor.for_training([conversation(2), conversation(1)], padding_side=side)
    rows = zip(batch["input_ids"], batch["attention_mask"].bool(), batch["labels"], strict=True)
    for count, (ids, mask, labels) in zip((2, 1), rows, strict=True):
        expected_ids, expected = preprocess(processor, TURNS[:count])
        assert ids[mask].tolist() == expected_ids
        assert labels[mask].tolist() == expected
        assert (labels[~mask] == -100).all()


def test_pictures_stand_in_questions(processor: QwenVLProcessor) -> None:
    batch = processor.for_training([conversation(2, picture(20, 30)), conversation(1)])
    assert batch["pixel_values"].shape == (1, 3, 28, 28)
    start = processor.tokenizer.special["<img>"]
    ((row, place),) = (batch["input_ids"] == start).nonzero().tolist()
    assert row == 0
    assert (batch["labels"][0, place : place + NUM_SLOTS + 2] == -100).all()


def test_without_chat_an_answer_and_its_end_are_learnt(processor: QwenVLProcessor) -> None:
    processor.chat_format = "raw"
    batch = processor.for_training([conversation(1)])
    encode = processor.tokenizer.encode
    question, answer = TURNS[0]
    end = processor.tokenizer.special["<|endoftext|>"]
    assert batch["input_ids"][0].tolist() == [*encode(question), *encode(answer), end]
    counted = batch["labels"][0]
    assert counted[counted != -100].tolist() == [*encode(answer), end]
    with pytest.raises(ValueError, match="messages: expected two without chat, got 4"):
        processor.for_training([conversation(2)])


def test_wrong_conversations_are_named(processor: QwenVLProcessor) -> None:
    for messages, message in (
        ([], "messages: expected at least one, got none"),
        (conversation(2)[:3], "messages: expected the assistant's turn at the end"),
        (conversation(2)[1:], "messages: expected user and assistant by turns"),
    ):
        with pytest.raises(ValueError, match=message):
            processor.for_training([messages])
    answer = {"role": "assistant", "content": "<|im_end|>"}
    ids = processor.for_training([[conversation(1)[0], answer]])["input_ids"]
    assert int((ids == processor.tokenizer.special["<|im_end|>"]).sum()) == 3  # that one is text
