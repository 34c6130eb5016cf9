"""The shipped weights: what they weigh and what they know."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

from vlmkernels.models import load
from vlmkernels.recipes.digits import CHECKPOINT
from vlmkernels.recipes.digits.blueprint import write_blueprint
from vlmkernels.recipes.digits.data import QUESTIONS, Example, load_scans
from vlmkernels.recipes.digits.demo import Reader, held_out_questions
from vlmkernels.recipes.digits.evaluate import accuracy, answer_all, prompt
from vlmkernels.recipes.digits.photo import normalise
from vlmkernels.recipes.digits.train import DigitsSettings
from vlmkernels.recipes.trainer import SETTINGS

from .test_photo import page

CANVASES = 120


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader.load()


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return held_out_questions(CANVASES)


def test_size() -> None:
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) <= 5_000_000
    assert not list(CHECKPOINT.glob("*.part"))


def test_held_out_accuracy(reader: Reader, examples: list[Example]) -> None:
    score = accuracy(examples, reader.answer(examples))
    assert {total for kind, (_, total) in score.items() if kind != "all"} == {CANVASES}
    assert set(score) == {"read", "count", "largest", "all"}
    assert all(right >= 0.95 * total for right, total in score.values()), score


def test_answers_come_from_the_picture(reader: Reader, examples: list[Example]) -> None:
    """With the pictures exchanged, reading falls to chance."""
    reading = [e for e in examples if e.kind == "read"]
    others = [Image.fromarray(e.canvas.pixels) for e in (*reading[1:], reading[0])]
    asked = [e.question for e in reading]
    answers = list(answer_all(reader.model, reader.processor, others, asked))
    right, total = accuracy(reading, answers)["read"]
    assert right <= 0.1 * total


def test_batch_size_changes_no_answer(reader: Reader, examples: list[Example]) -> None:
    some = examples[:12]
    pictures = [e.canvas.pixels for e in some]
    asked = [e.question for e in some]
    model = load(CHECKPOINT, dtype=torch.float32)
    alone, together = (
        list(answer_all(model, reader.processor, pictures, asked, batch=batch)) for batch in (1, 12)
    )
    assert alone == together


def test_every_phrasing_is_understood(reader: Reader) -> None:
    examples = held_out_questions(10)
    for kind, phrasings in QUESTIONS.items():
        mine = [e for e in examples if e.kind == kind]
        for phrasing in phrasings:
            pictures = [e.canvas.pixels for e in mine]
            answers = answer_all(reader.model, reader.processor, pictures, [phrasing] * len(mine))
            right, total = accuracy(mine, list(answers))["all"]
            assert right >= 0.8 * total, phrasing


def test_transformers_reads_the_checkpoint(reader: Reader, examples: list[Example]) -> None:
    theirs = Qwen2VLForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    example = examples[0]
    text = prompt(reader.processor, example.question)
    inputs = reader.processor([text], [example.canvas.pixels])
    content = [{"type": "image"}, {"type": "text", "text": example.question}]
    message = {"role": "user", "content": content}
    rendered = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    assert rendered == text
    assert tokenizer(text).input_ids == reader.processor.tokenizer.encode(text)
    with torch.no_grad():
        expected = theirs(**inputs).logits
        got = load(CHECKPOINT, dtype=torch.float32)(**inputs).logits
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_photos_of_digits(reader: Reader) -> None:
    """Pages of held-out digits by the way that --image takes."""
    labels = load_scans()[1].labels
    right = total = 0
    for first in range(0, 36, 3):
        row = [first, first + 1, first + 2]
        canvas = normalise(page([row], seed=first))
        (given,) = answer_all(
            reader.model, reader.processor, [canvas], ["Read the digits in reading order."]
        )
        right += sum(g == str(labels[i]) for g, i in zip(given, row, strict=False))
        total += 3
    assert right >= 0.8 * total


def test_the_recipe_that_ships_is_the_one_that_made_it(tmp_path: Path) -> None:
    """A change of the settings, the architecture or the tokenizer asks for new weights."""
    assert json.loads((CHECKPOINT / SETTINGS).read_text()) == asdict(DigitsSettings())
    write_blueprint(tmp_path)
    for path in tmp_path.iterdir():
        shipped, made = (CHECKPOINT / path.name).read_text(), path.read_text()
        assert json.loads(shipped) == json.loads(made), path.name
    docs = Path(__file__).parents[3] / "docs" / "digits.md"
    assert f"{DigitsSettings().steps:,} steps" in docs.read_text()
