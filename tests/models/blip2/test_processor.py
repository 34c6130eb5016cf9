"""BLIP-2's processor: pixels and tokens as transformers', prompts as LAVIS'."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

from tests.models.blip2.conftest import write_retrieval, write_tokenizer
from tests.models.common import ask, picture
from vlmkernels.models import load, load_processor
from vlmkernels.models.blip2 import Blip2OPT, Blip2Processor, Blip2T5

SIZES = [(32, 32), (37, 91), (200, 33), (20, 25)]
QUESTION = "Question: what is in the picture? Answer:"


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("resize", [True, False])
def test_pixels_are_bit_equal_to_transformers(
    size: tuple[int, int], resize: bool, checkpoint_dir: Path
) -> None:
    theirs = transformers.BlipImageProcessorPil.from_pretrained(checkpoint_dir, do_resize=resize)
    ours = load_processor(checkpoint_dir)
    ours.image.do_resize = resize
    images = [Image.fromarray(picture(*size)), Image.fromarray(picture(*size, seed=1))]
    expected = theirs(images, return_tensors="pt")["pixel_values"]
    assert torch.equal(ours(images=images)["pixel_values"], expected)


def test_tokens_match_transformers(checkpoint_dir: Path, processor: Blip2Processor) -> None:
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(
        checkpoint_dir, padding_side="right"
    )
    pil = transformers.BlipImageProcessorPil.from_pretrained(checkpoint_dir)
    theirs = transformers.Blip2Processor(pil, tokenizer, num_query_tokens=4)
    texts = ["a dog", QUESTION]
    images = [Image.fromarray(picture(40, 50, seed=i)) for i in range(2)]
    expected = theirs(images=images, text=texts, padding=True, return_tensors="pt")
    ours = processor(texts, images, padding_side="right")
    for name in ("input_ids", "attention_mask", "pixel_values"):
        assert torch.equal(ours[name], expected[name]), name
    left = processor(texts, images)  # transformers puts padding between image and text
    assert left["attention_mask"][0, 0] == 0
    for a, b in zip((left, ours), (ours, left), strict=True):
        real = [x["input_ids"][x["attention_mask"] == 1] for x in (a, b)]
        assert torch.equal(*real)


def test_a_conversation_is_questions_and_answers(processor: Blip2Processor) -> None:
    cat: dict[str, Any] = {"type": "image", "image": picture(9, 9)}
    question = {"role": "user", "content": [cat, {"type": "text", "text": "what is it?"}]}
    assert processor.apply_chat_template([question]) == "Question: what is it? Answer:"
    more = [
        question,
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": "red?"},
    ]
    expected = "Question: what is it? Answer: a cat. Question: red? Answer:"
    assert processor.apply_chat_template(more) == expected
    inputs = processor.from_messages(more)
    assert torch.equal(inputs["input_ids"], processor(expected)["input_ids"])
    assert len(inputs["pixel_values"]) == 1
    assert processor.apply_chat_template([{"role": "user", "content": [cat]}]) == ""
    more[1]["content"] = " a cat\n"  # as a model says it
    assert processor.apply_chat_template(more) == expected
    with pytest.raises(ValueError, match="expected user and assistant, got system"):
        processor.from_messages([{"role": "system", "content": "Be short."}, question])
    for pictures in (0, 2):
        with pytest.raises(ValueError, match=f"images: expected 1 .*, got {pictures}"):
            processor("a", [picture(9, 9)] * pictures)


def test_a_saved_processor_is_the_same(
    checkpoint_dir: Path, processor: Blip2Processor, tmp_path: Path
) -> None:
    processor.save_pretrained(tmp_path)
    shutil.copy(checkpoint_dir / "config.json", tmp_path)
    again = load_processor(tmp_path)
    assert again.image == processor.image and again.num_query_tokens == 4
    assert json.loads((tmp_path / "processor_config.json").read_text())["num_query_tokens"] == 4
    image = Image.fromarray(picture(37, 91))
    for name, x in processor(QUESTION, image).items():
        assert torch.equal(again(QUESTION, image)[name], x), name
    with pytest.raises(ValueError, match="expected text, images or both"):
        again()


def test_texts_of_the_first_stage(tmp_path: Path) -> None:
    write_retrieval(tmp_path)
    write_tokenizer(tmp_path, "bert")
    processor = load_processor(tmp_path)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    pil = transformers.BlipImageProcessorPil.from_pretrained(tmp_path)
    theirs = transformers.Blip2Processor(pil, tokenizer)
    texts = ["a cat", "two red cars and a dog"]
    expected = theirs(text=texts, padding=True, return_tensors="pt")
    ours = processor(texts)
    assert torch.equal(ours["input_ids"], expected["input_ids"])
    assert torch.equal(ours["attention_mask"], expected["attention_mask"])
    cut = processor(texts[1], max_length=4)["input_ids"][0]
    whole = processor(texts[1])["input_ids"][0]
    assert torch.equal(cut, torch.cat([whole[:3], whole[-1:]]))
    with pytest.raises(ValueError, match="max_length: expected a positive integer, got 0"):
        processor(texts, max_length=0)


def test_a_text_is_cut_as_transformers_cuts_it(processor: Blip2Processor) -> None:
    """These tokenizers put a token in front (OPT) or behind (T5)."""
    whole = processor.tokenizer.encode("two red cars", add_special_tokens=True)
    words = processor.tokenizer.encode("two red cars")
    behind = whole[-1] != words[-1]
    for length in range(2, len(whole) + 1):
        ids = processor("two red cars", max_length=length)["input_ids"][0].tolist()
        kept = [i for i in ids if i != processor.image_token_id]
        if behind:
            assert kept == whole[: length - 1] + whole[-1:]
        else:
            assert kept == whole[:length]


def test_real_pictures_end_to_end(model: Blip2OPT | Blip2T5, processor: Blip2Processor) -> None:
    pictures = pytest.importorskip("sklearn.datasets").load_sample_images().images
    inputs = processor([QUESTION, "a"], pictures)
    out = model.generate(**inputs, max_new_tokens=4, num_beams=2, eos_token_id=())
    before = 1 if isinstance(model, Blip2T5) else inputs["input_ids"].shape[1]
    assert out.shape == (2, before + 4)


def test_ask_answers_on_the_command_line(
    checkpoint_dir: Path,
    processor: Blip2Processor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    question = "what is in the picture?"
    answer = ask(checkpoint_dir, tmp_path / "a.png", question, monkeypatch, capsys)
    inputs = processor(QUESTION, tmp_path / "a.png")
    new = torch.stack(list(load(checkpoint_dir).generate_steps(**inputs, max_new_tokens=5)))
    assert answer == (0, processor.tokenizer.decode(new[:, 0].tolist()) + "\n", "")
