"""Pixels and prompts: bit-equal to transformers' Pillow processor, frame order spelled out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as hf_pixels

from tests.models.qwen2_vl import cases
from vlmkernels.models import load_processor
from vlmkernels.models.images import load_rgb
from vlmkernels.models.qwen2_vl import Qwen2VLProcessor
from vlmkernels.models.qwen2_vl.processor import PixelSettings, smart_resize
from vlmkernels.models.tokenizer import Tokenizer

SIZES = [(56, 56), (37, 91), (3, 7), (200, 33), (10, 1999), (301, 499)]


def as_mode(mode: str, height: int = 37, width: int = 91) -> Image.Image:
    rgba = np.random.default_rng(0).integers(0, 256, (height, width, 4), dtype=np.uint8)
    image = Image.fromarray(rgba)
    return image.convert(mode) if mode in ("RGBA", "LA") else image.convert("RGB").convert(mode)


@pytest.fixture(scope="module")
def hf_processor(checkpoint_dir: Path) -> transformers.Qwen2VLImageProcessorPil:
    return transformers.Qwen2VLImageProcessorPil.from_pretrained(checkpoint_dir)


def assert_same_pixels(
    processor: Qwen2VLProcessor, hf_processor: Any, images: list[Any], for_hf: list[Any]
) -> None:
    expected = hf_processor(images=for_hf, return_tensors="pt")
    ours = processor("<|image_pad|>" * len(images), images)
    assert torch.equal(ours["image_grid_thw"], expected["image_grid_thw"])
    assert ours["pixel_values"].dtype == torch.float32
    assert torch.equal(ours["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixels_are_bit_equal_to_transformers(
    size: tuple[int, int], processor: Qwen2VLProcessor, hf_processor: Any
) -> None:
    image = Image.fromarray(cases.picture(*size))
    assert_same_pixels(processor, hf_processor, [image], [image])


def test_several_images_in_one_call_are_bit_equal(
    processor: Qwen2VLProcessor, hf_processor: Any
) -> None:
    images = [Image.fromarray(cases.picture(h, w)) for h, w in SIZES]
    assert_same_pixels(processor, hf_processor, images, images)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "F", "I"])
def test_every_mode_is_bit_equal(mode: str, processor: Qwen2VLProcessor, hf_processor: Any) -> None:
    image = as_mode(mode)
    assert image.mode == mode
    assert_same_pixels(processor, hf_processor, [image], [image])


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_lies_over_white(
    mode: str, processor: Qwen2VLProcessor, hf_processor: Any
) -> None:
    # Older transformers drops alpha instead; over white is what qwen-vl-utils and 5.23 do.
    image = as_mode(mode)
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    flat = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    assert_same_pixels(processor, hf_processor, [image], [flat])


@pytest.mark.parametrize("layout", ["hwc", "chw", "grey"])
def test_arrays_and_tensors_are_bit_equal(
    layout: str, processor: Qwen2VLProcessor, hf_processor: Any
) -> None:
    array = cases.picture(61, 90)
    array = {"hwc": array, "chw": array.transpose(2, 0, 1), "grey": array[..., 0]}[layout]
    plain = Image.fromarray(cases.picture(61, 90) if layout != "grey" else array)
    assert_same_pixels(processor, hf_processor, [array], [plain])
    assert_same_pixels(processor, hf_processor, [torch.from_numpy(array.copy())], [plain])


def test_sixteen_bit_grey_keeps_its_upper_byte(tmp_path: Path) -> None:
    grey = np.arange(56 * 56, dtype=np.uint16).reshape(56, 56) * 20
    Image.fromarray(grey).save(tmp_path / "deep.png")
    assert np.array_equal(load_rgb(tmp_path / "deep.png")[..., 1], grey >> 8)


def test_a_files_rotation_is_applied(tmp_path: Path) -> None:
    image = Image.fromarray(cases.picture(30, 50))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned left
    image.save(tmp_path / "turned.png", exif=exif)
    expected = np.rot90(np.asarray(image), k=-1)
    assert np.array_equal(load_rgb(tmp_path / "turned.png"), expected)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 4000), st.integers(1, 4000))
def test_smart_resize_matches_transformers(height: int, width: int) -> None:
    sizes = {"factor": 28, "min_pixels": 56 * 56, "max_pixels": 28 * 28 * 64}
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ValueError, match="aspect ratio"):
            smart_resize(height, width, **sizes)
        return
    assert smart_resize(height, width, **sizes) == hf_pixels.smart_resize(height, width, **sizes)


def test_video_rows_hold_two_frames_block_by_block() -> None:
    settings = PixelSettings(patch_size=2, do_normalize=False, do_rescale=False, do_resize=False)
    frames = cases.video(3, 4, 8)
    rows, grid = settings.patchify(list(frames), (4, 8))
    assert grid == (2, 2, 4)
    expected = []
    padded = [*frames, frames[-1]]  # an odd last frame is doubled
    for t in range(2):
        for block_x in range(2):  # one block high, two wide; 2 x 2 patches in each
            for y, x in ((0, 0), (0, 1), (1, 0), (1, 1)):
                top, left = 2 * y, 4 * block_x + 2 * x
                pair = np.stack(padded[2 * t : 2 * t + 2])[:, top : top + 2, left : left + 2]
                expected.append(pair.transpose(3, 0, 1, 2).ravel())  # channel, frame, row, column
    assert np.array_equal(rows, np.array(expected, dtype=np.float32))


def test_a_still_video_equals_its_image(processor: Qwen2VLProcessor) -> None:
    frame = cases.picture(336, 364)
    settings = PixelSettings(min_pixels=processor.video.min_pixels, max_pixels=10**9)
    image = Qwen2VLProcessor(processor.tokenizer, settings)("<|image_pad|>", [frame])
    video = processor("<|video_pad|>", videos=[[frame, frame]])
    assert torch.equal(video["video_grid_thw"], image["image_grid_thw"])
    assert torch.equal(video["pixel_values_videos"], image["pixel_values"])


def test_a_directory_of_frames_is_a_video_in_order_of_names(
    tmp_path: Path, processor: Qwen2VLProcessor
) -> None:
    frames = cases.video(4, 56, 84)
    for i in (2, 0, 3, 1):
        Image.fromarray(frames[i]).save(tmp_path / f"{i:03}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    expected = processor("<|video_pad|>", videos=[frames])
    for videos in (tmp_path, [str(tmp_path)], [list(frames)], list(frames)):
        ours = processor("<|video_pad|>", videos=videos)
        assert torch.equal(ours["pixel_values_videos"], expected["pixel_values_videos"])
    assert expected["video_grid_thw"].tolist()[0][0] == 2


def test_frames_are_in_the_order_of_their_numbers(
    tmp_path: Path, processor: Qwen2VLProcessor
) -> None:
    frames = cases.video(12, 28, 28)
    for i in (10, 2, 0, 11, 9, 3, 1, 8, 4, 7, 5, 6):
        Image.fromarray(frames[i]).save(tmp_path / f"frame{i}.png")
    expected = processor("<|video_pad|>", videos=[frames])
    ours = processor("<|video_pad|>", videos=tmp_path)
    assert torch.equal(ours["pixel_values_videos"], expected["pixel_values_videos"])


def test_a_long_video_gets_fewer_pixels_per_frame(processor: Qwen2VLProcessor) -> None:
    # qwen-vl-utils: total 0.9 * 128000 tokens of 28 x 28 pixels, two frames to a token.
    few, many = processor._max_frame_pixels(100), processor._max_frame_pixels(768)
    assert few == 768 * 28 * 28
    assert many == 2 * 115_200 * 28 * 28 // 768


def test_placeholders_grow_and_types_tell_image_from_video(processor: Qwen2VLProcessor) -> None:
    text = f"a {cases.IMAGE} b {cases.VIDEO} c {cases.IMAGE}"
    images = [cases.picture(56, 112), cases.picture(84, 84)]
    out = processor(text, images, [cases.video(4, 56, 56)])
    counts = [int(grid.prod()) // 4 for grid in out["image_grid_thw"]]
    frames = int(out["video_grid_thw"][0].prod()) // 4
    runs = [(0, 0)]
    for kind in out["mm_token_type_ids"][0].tolist():
        runs = [*runs, (kind, 1)] if kind != runs[-1][0] else [*runs[:-1], (kind, runs[-1][1] + 1)]
    assert [run for run in runs if run[0]] == [(1, counts[0]), (2, frames), (1, counts[1])]
    assert counts == [8, 9]


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_different_length_are_padded(side: str, processor: Qwen2VLProcessor) -> None:
    texts = ["What is in the picture?", "user"]
    out = processor(texts, padding_side=side)
    for i, text in enumerate(texts):
        ids = processor.tokenizer.encode(text)
        padding = out["input_ids"].shape[1] - len(ids)
        mask = [0] * padding + [1] * len(ids)
        pads = [processor.tokenizer.pad_token_id] * padding
        assert out["attention_mask"][i].tolist() == (mask if side == "left" else mask[::-1])
        assert out["input_ids"][i].tolist() == (pads + ids if side == "left" else ids + pads)


def test_chat_template_matches_transformers(
    checkpoint_dir: Path, processor: Qwen2VLProcessor
) -> None:
    hf = transformers.PreTrainedTokenizerFast(tokenizer_file=str(checkpoint_dir / "tokenizer.json"))
    template = processor.tokenizer.chat_template
    content = [{"type": "image"}, {"type": "text", "text": "What is {{ this }}?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "café"}]
    for prompt in (True, False):
        expected = hf.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
        assert processor.apply_chat_template(messages, add_generation_prompt=prompt) == expected
        assert hf.encode(expected) == processor.tokenizer.encode(expected)


def test_chat_template_with_a_published_tokenizer_config(processor: Qwen2VLProcessor) -> None:
    """Qwen2-VL's has null and false under names of tokens."""
    plain = processor.tokenizer
    config = {**plain.config, "bos_token": None, "unk_token": None, "add_bos_token": False}
    published = Tokenizer(plain.backend, config, plain.chat_template)
    messages = [{"role": "user", "content": "Hello"}]
    assert published.apply_chat_template(messages) == plain.apply_chat_template(messages)


def test_messages_carry_their_pictures(processor: Qwen2VLProcessor) -> None:
    image, frames = cases.picture(56, 56), cases.video(2, 56, 56)
    content = [
        {"type": "video", "video": frames},
        {"type": "image", "image": image},
        {"type": "text", "text": "What is in the picture?"},
    ]
    out = processor.from_messages([{"role": "user", "content": content}])
    text = processor.apply_chat_template([{"role": "user", "content": content}])
    expected = processor(text, [image], [frames])
    assert text.endswith("<|im_start|>assistant\n")
    assert {k: v.tolist() for k, v in out.items()} == {k: v.tolist() for k, v in expected.items()}


@pytest.mark.parametrize(
    "size",
    [
        {"min_pixels": 3136, "max_pixels": 12845056},  # as published
        {"size": {"shortest_edge": 3136, "longest_edge": 12845056}},  # transformers 5
        {"size": {"min_pixels": 3136, "max_pixels": 12845056}},  # transformers 4.45
    ],
    ids=["published", "edges", "nested"],
)
@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_settings_are_read_from_every_layout(
    size: dict[str, Any], file: str, tmp_path: Path, checkpoint_dir: Path
) -> None:
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((checkpoint_dir / name).read_bytes())
    content = size | {"patch_size": 16, "image_processor_type": "Qwen2VLImageProcessor"}
    content = {"image_processor": content} if file == "processor_config.json" else content
    (tmp_path / file).write_text(json.dumps(content))
    image = load_processor(tmp_path).image
    assert (image.min_pixels, image.max_pixels, image.patch_size) == (3136, 12845056, 16)


def test_saved_processor_is_the_same_and_transformers_reads_it(
    tmp_path: Path, checkpoint_dir: Path, processor: Qwen2VLProcessor
) -> None:
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((checkpoint_dir / "config.json").read_bytes())
    again = load_processor(tmp_path)
    assert (again.image, again.video) == (processor.image, processor.video)
    assert again.tokenizer.chat_template == processor.tokenizer.chat_template
    image = cases.picture(301, 499)
    hf = transformers.Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    assert_same_pixels(again, hf, [image], [Image.fromarray(image)])


def test_labels_stand_on_answers_alone(processor: Qwen2VLProcessor) -> None:
    answers = ["café 数字", "two\n\nlines "]
    image, frames = cases.picture(56, 84), [cases.picture(28, 28, seed=i) for i in range(2)]
    asked = [{"type": "image", "image": image}, {"type": "text", "text": "assistant\n"}]
    conversations = [
        [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": answers[0]},
            {"role": "user", "content": [{"type": "video", "video": frames}]},
            {"role": "assistant", "content": [{"type": "text", "text": answers[1]}]},
        ],
        [{"role": "user", "content": "only a question"}],
    ]
    batch = processor.for_training(conversations, padding_side="right")
    counted = batch["labels"] != -100
    assert torch.equal(batch["labels"][counted], batch["input_ids"][counted])
    text = processor.tokenizer.decode(
        batch["labels"][0][counted[0]].tolist(), skip_special_tokens=False
    )
    assert text == "".join(f"{answer}<|im_end|>" for answer in answers)
    assert not counted[1].any() and (batch["mm_token_type_ids"] != 0).sum() > 2
