"""Which tokens of a conversation carry loss: those that the original code counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.models.common import picture
from vlmkernels.models import load_processor
from vlmkernels.models.llava import VICUNA_V1, Llava, LlavaProcessor

TURNS = [
    ("What is in the picture?", "a cat"),
    ("and a dog?", "the cat and a dog."),
]


def conversation(turns: list[tuple[str, str]], image: object = None) -> list[dict[str, object]]:
    messages: list[dict[str, object]] = []
    for question, answer in turns:
        pictures = [{"type": "image", "image": image}] if image is not None and not messages else []
        messages += [
            {"role": "user", "content": [*pictures, {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
    return messages


@pytest.fixture
def vicuna(checkpoint_dir: Path) -> LlavaProcessor:
    processor = load_processor(checkpoint_dir)
    processor.tokenizer.chat_template = VICUNA_V1
    return processor


def preprocess_v1(ids: torch.Tensor, text: str, processor: LlavaProcessor) -> torch.Tensor:
    """The original's mask (llava/train/train.py), transcribed."""

    def tokenize(part: str) -> list[int]:
        return processor.tokenizer.encode(part, add_special_tokens=True)

    target, begin = ids.clone(), 1
    target[:begin] = -100
    for turn in text.split("</s>"):
        if not turn:
            break
        instruction = turn.split(" ASSISTANT: ")[0] + " ASSISTANT: "
        target[begin : begin + len(tokenize(instruction)) - 2] = -100
        begin += len(tokenize(turn))
    target[begin:] = -100
    return target


@pytest.mark.parametrize("count", [1, 2])
def test_labels_are_the_original_codes(count: int, vicuna: LlavaProcessor) -> None:
    messages = conversation(TURNS[:count])
    batch = vicuna.for_training([messages])
    text = vicuna.apply_chat_template(messages, add_generation_prompt=False)
    expected = preprocess_v1(batch["input_ids"][0], text, vicuna)
    assert torch.equal(batch["labels"][0], expected)
    assert (expected == 2).sum() == count and (expected == -100).sum() > 10  # </s> counts


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_with_pictures_trains(side: str, vicuna: LlavaProcessor, model: Llava) -> None:
    conversations = [conversation(TURNS, picture(20, 30)), conversation(TURNS[:1])]
    batch = vicuna.for_training(conversations, padding_side=side)
    assert (batch["input_ids"] == 3).sum() == 16
    for ids, labels, count in zip(batch["input_ids"], batch["labels"], (2, 1), strict=True):
        counted = labels != -100
        assert torch.equal(ids[counted], labels[counted])
        answers = [vicuna.tokenizer.encode(answer + "</s>") for _, answer in TURNS[:count]]
        assert labels[counted].tolist() == [token for answer in answers for token in answer]
    assert float(model(**batch).loss.detach()) > 0


def test_what_is_no_conversation_is_named(vicuna: LlavaProcessor) -> None:
    for conversations, message in (
        ([[]], "messages: expected at least one, got none"),
        ([conversation(TURNS, "gone.jpg")], "image gone.jpg: expected an image file, found none"),
        ([[{"from": "human", "value": "hi"}]], r"messages\[0\]\['role'\]: expected a string"),
        (conversation(TURNS), "messages: expected a list, got {'role': 'user'"),
        ([], "text: expected at least one, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            vicuna.for_training(conversations)


def test_a_template_that_rewrites_turns_is_refused(checkpoint_dir: Path) -> None:
    processor = load_processor(checkpoint_dir)
    processor.tokenizer.chat_template = "{{ messages | length }}{{ messages[-1]['role'] }}"
    with pytest.raises(ValueError, match=r"chat template: expected one .* up to messages\[1\]"):
        processor.for_training([conversation(TURNS)])
