"""LLaVA-1.5's processor: pixels and tokens as transformers', conversations as the original's."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from tests.models.common import ask, picture
from vlmkernels.models import load, load_processor
from vlmkernels.models.llava import VICUNA_V1, Llava, LlavaProcessor
from vlmkernels.models.tokenizer import Tokenizer

SIZES = [(32, 32), (37, 91), (200, 33), (20, 25)]


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixels_are_bit_equal_to_transformers(
    size: tuple[int, int], pad: bool, checkpoint_dir: Path, processor: LlavaProcessor
) -> None:
    theirs = transformers.LlavaImageProcessorPil.from_pretrained(checkpoint_dir, do_pad=pad)
    images = [Image.fromarray(picture(*size)), Image.fromarray(picture(40, 47, seed=1))]
    expected = theirs(images, return_tensors="pt")["pixel_values"]
    ours = processor("<image><image>", images, pad_to_square=pad)["pixel_values"]
    assert torch.equal(ours, expected)


def test_padding_to_a_square_is_the_original_codes(processor: LlavaProcessor) -> None:
    """expand2square of the original repository, then CLIP's resizing."""
    image = Image.fromarray(picture(40, 100))
    square = Image.new("RGB", (100, 100), tuple(int(x * 255) for x in processor.image.image_mean))
    square.paste(image, (0, 30))
    padded = processor("<image>", [image], pad_to_square=True)["pixel_values"]
    assert torch.equal(padded, processor("<image>", [square])["pixel_values"])
    assert not torch.equal(padded, processor("<image>", [image])["pixel_values"])


def test_tokens_match_transformers(checkpoint_dir: Path, processor: LlavaProcessor) -> None:
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(checkpoint_dir)
    pil = transformers.LlavaImageProcessorPil.from_pretrained(checkpoint_dir)
    theirs = transformers.LlavaProcessor(
        pil,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    texts = ["USER: <image>\nWhat is in the picture? ASSISTANT:", "a dog", "<image> and <image>"]
    images = [Image.fromarray(picture(40, 50, seed=i)) for i in range(3)]
    expected = theirs(images=images, text=texts, padding=True, return_tensors="pt")
    ours = processor(texts, images)
    for name in ("input_ids", "attention_mask", "pixel_values"):
        assert torch.equal(ours[name], expected[name]), name
    assert (ours["input_ids"] == 3).sum(dim=1).tolist() == [16, 0, 32]


def test_the_published_template_is_rendered(processor: LlavaProcessor) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": [{"type": "text", "text": "And?"}]},
    ]
    text = "USER: <image>\nWhat? ASSISTANT: A cat. USER: And? ASSISTANT:"
    assert processor.apply_chat_template(messages) == text


def test_the_conversation_of_the_original(processor: LlavaProcessor) -> None:
    tokenizer = Tokenizer(processor.tokenizer.backend)
    own = LlavaProcessor(tokenizer, processor.image, patch_size=8)
    assert own.tokenizer.chat_template == VICUNA_V1
    content = [{"type": "text", "text": "What is it?"}, {"type": "image", "image": picture(9, 9)}]
    messages: list[Any] = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "And?"},
    ]
    system = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. "
    )
    expected = "USER: <image>\nWhat is it? ASSISTANT: A cat.</s>USER: And? ASSISTANT:"
    assert own.apply_chat_template(messages) == system + expected
    plain = [{"role": "system", "content": "Be short."}, *messages]
    assert own.apply_chat_template(plain) == "Be short. " + expected
    inputs = own.from_messages(messages)
    assert int((inputs["input_ids"] == 3).sum()) == 16 and len(inputs["pixel_values"]) == 1


def test_a_saved_processor_is_the_same(
    checkpoint_dir: Path, processor: LlavaProcessor, tmp_path: Path
) -> None:
    processor.save_pretrained(tmp_path)
    shutil.copy(checkpoint_dir / "config.json", tmp_path)
    again = load_processor(tmp_path)
    assert again.image == processor.image and again.patch_size == 8
    image = Image.fromarray(picture(37, 91))
    for name, x in processor("a <image>", [image]).items():
        assert torch.equal(again("a <image>", [image])[name], x), name


def test_pictures_and_placeholders_must_match(processor: LlavaProcessor) -> None:
    with pytest.raises(ValueError, match="text: expected 1 <image> \\(one each\\), got 2"):
        processor("<image> <image>", [picture(9, 9)])
    with pytest.raises(ValueError, match="text: expected at least one"):
        processor([])


def test_a_real_picture_end_to_end(model: Llava, processor: LlavaProcessor) -> None:
    china, flower = pytest.importorskip("sklearn.datasets").load_sample_images().images
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": china},
                {"type": "image", "image": np.asarray(flower)},
                {"type": "text", "text": "Describe the two images."},
            ],
        }
    ]
    inputs = processor.from_messages(messages)
    out = model.generate(**inputs, max_new_tokens=5, eos_token_id=())
    assert out.shape == (1, inputs["input_ids"].shape[1] + 5)


def test_ask_answers_on_the_command_line(
    checkpoint_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answer = ask(checkpoint_dir, tmp_path / "a.png", "What is it?", monkeypatch, capsys)
    model, processor = load(checkpoint_dir), load_processor(checkpoint_dir)
    inputs = processor("USER: <image>\nWhat is it? ASSISTANT:", [tmp_path / "a.png"])
    ids = model.generate(**inputs, max_new_tokens=5)[0, inputs["input_ids"].shape[1] :]
    assert answer == (0, processor.tokenizer.decode(ids.tolist()) + "\n", "")
