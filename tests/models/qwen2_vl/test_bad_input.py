"""What is wrong is said in one sentence that names it; nothing crashes or goes on quietly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.models.qwen2_vl import cases
from vlmkernels.models import images, load_processor
from vlmkernels.models.qwen2_vl import Qwen2VL, Qwen2VLProcessor

Inputs = dict[str, Any]


def without(inputs: Inputs, *names: str) -> Inputs:
    return {name: value for name, value in inputs.items() if name not in names}


MODEL_INPUTS: list[tuple[str, Callable[[Inputs], Inputs], type[Exception], str]] = [
    ("no ids", lambda x: without(x, "input_ids"), ValueError, "exactly one of input_ids"),
    ("both", lambda x: x | {"inputs_embeds": torch.zeros(1, 2, 64)}, ValueError, "exactly one"),
    ("1-D ids", lambda x: x | {"input_ids": x["input_ids"][0]}, ValueError, r"\(batch, seqlen\)"),
    ("empty ids", lambda x: x | {"input_ids": x["input_ids"][:, :0]}, ValueError, r"got \(1, 0\)"),
    ("float ids", lambda x: x | {"input_ids": x["input_ids"].float()}, TypeError, "int32 or int64"),
    ("large id", lambda x: x | {"input_ids": x["input_ids"] + 320}, ValueError, r"in \[0, 320\)"),
    ("no pixels", lambda x: without(x, "pixel_values"), ValueError, "image_grid_thw: expected tog"),
    (
        "no image",
        lambda x: without(x, "pixel_values", "image_grid_thw"),
        ValueError,
        "expected for 8 image tokens, got None",
    ),
    (
        "byte pixels",
        lambda x: x | {"pixel_values": x["pixel_values"].byte()},
        TypeError,
        "pixel_values: expected floating point, got torch.uint8",
    ),
    (
        "narrow rows",
        lambda x: x | {"pixel_values": x["pixel_values"][:, 1:]},
        ValueError,
        r"pixel_values: expected shape \(num_patches, 1176\)",
    ),
    (
        "short rows",
        lambda x: x | {"pixel_values": x["pixel_values"][1:]},
        ValueError,
        r"pixel_values: expected 32 rows \(the patches of grid_thw\), got 31",
    ),
    (
        "odd grid",
        lambda x: x | {"image_grid_thw": torch.tensor([[1, 1, 32]])},
        ValueError,
        "h and w multiples of 2",
    ),
    (
        "empty grid",
        lambda x: x | {"image_grid_thw": torch.zeros(1, 3, dtype=torch.int64)},
        ValueError,
        "positive",
    ),
    (
        "grid shape",
        lambda x: x | {"image_grid_thw": torch.tensor([1, 4, 8])},
        ValueError,
        r"grid_thw: expected shape \(num_images, 3\)",
    ),
    (
        "cut placeholders",
        lambda x: {
            k: v[:, :6] if "grid" not in k and k != "pixel_values" else v for k, v in x.items()
        },
        ValueError,
        r"expected 8 image tokens \(one a feature\), got",
    ),
    (
        "mask shape",
        lambda x: x | {"attention_mask": x["attention_mask"][:, 1:]},
        ValueError,
        "attention_mask: expected shape",
    ),
    (
        "positions",
        lambda x: x | {"position_ids": torch.zeros(2, *x["input_ids"].shape)},
        ValueError,
        "position_ids: expected shape",
    ),
    (
        "labels",
        lambda x: x | {"labels": x["input_ids"][:, 1:]},
        ValueError,
        "labels: expected shape",
    ),
    (
        "float labels",
        lambda x: x | {"labels": x["input_ids"].float()},
        TypeError,
        "labels: expected int32 or int64, got torch.float32",
    ),
    (
        "large label",
        lambda x: x | {"labels": x["input_ids"] + 320},
        ValueError,
        r"labels: expected -100 or in \[0, 320\), got",
    ),
    (
        "another mark than -100",
        lambda x: x | {"labels": torch.full_like(x["input_ids"], -1)},
        ValueError,
        "labels: expected -100 or in .*, got -1",
    ),
    (
        "a list as mask",
        lambda x: x | {"attention_mask": x["attention_mask"].tolist()},
        TypeError,
        "attention_mask: expected a torch.Tensor, got list",
    ),
    (
        "labels of a part",
        lambda x: x | {"labels": x["input_ids"], "logits_to_keep": 1},
        ValueError,
        "logits_to_keep: expected 0 with labels",
    ),
    (
        "seconds",
        lambda x: x | {"second_per_grid_ts": torch.ones(1)},
        ValueError,
        "second_per_grid_ts: expected None, Qwen2-VL counts steps",
    ),
    (
        "unknown",
        lambda x: x | {"pixel_value": x["pixel_values"]},
        TypeError,
        "unexpected keyword argument 'pixel_value'",
    ),
]


@pytest.mark.parametrize(
    ("change", "error", "message"), [c[1:] for c in MODEL_INPUTS], ids=[c[0] for c in MODEL_INPUTS]
)
def test_model_names_the_wrong_argument(
    change: Callable[[Inputs], Inputs],
    error: type[Exception],
    message: str,
    model: Qwen2VL,
    processor: Qwen2VLProcessor,
) -> None:
    inputs = cases.make("one_image", processor)
    with pytest.raises(error, match=message):
        model(**change(inputs))


def test_generate_refuses_unknown_keywords(model: Qwen2VL, processor: Qwen2VLProcessor) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_tokens'"):
        model.generate(**cases.make("text", processor), max_tokens=3)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "messages: expected a list, got 'hello'"),
        ([], "messages: expected at least one, got none"),
        (["hello"], r"messages\[0\]: expected an object, got 'hello'"),
        ([{"content": "a"}], r"messages\[0\]\['role'\]: expected a string, got None"),
        ([{"role": "user"}], r"messages\[0\]\['content'\]: expected a text or parts, got None"),
        ([{"role": "user", "content": ["a"]}], r"\['content'\]\[0\]: expected an image, a vid"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"audio": 1}]}],
            r"\[1\]: expected an image, a video or a text, got {'audio': 1}",
        ),
    ],
)
def test_what_is_no_conversation(messages: Any, message: str, processor: Qwen2VLProcessor) -> None:
    with pytest.raises(ValueError, match=message):
        processor.from_messages(messages)


def test_ids_that_are_no_tensor(model: Qwen2VL) -> None:
    with pytest.raises(TypeError, match=r"input_ids: expected a torch.Tensor, got list"):
        model.generate([[1, 2]])


def test_a_row_of_padding_only_gives_zeros_and_leaves_the_rest(
    model: Qwen2VL, processor: Qwen2VLProcessor
) -> None:
    ids = processor("What is in the picture?")["input_ids"].expand(2, -1)
    mask = torch.ones_like(ids)
    expected = model(ids, attention_mask=mask).logits
    mask = torch.stack([mask[0], mask[0] * 0])
    logits = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[0], expected[0])
    assert not logits[1].any()


@pytest.fixture
def png(tmp_path: Path) -> Path:
    Image.fromarray(cases.picture(60, 80)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.1, 0.6])
@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif"])
def test_a_truncated_image_is_named(
    keep: float, kind: str, tmp_path: Path, processor: Qwen2VLProcessor
) -> None:
    file = tmp_path / f"a.{kind}"
    Image.fromarray(cases.picture(60, 80)).save(file)
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(ValueError, match=rf"image .*a\.{kind}: expected a readable image"):
        processor("<|image_pad|>", [file])


def test_what_is_no_image_is_named(tmp_path: Path, processor: Qwen2VLProcessor) -> None:
    (tmp_path / "notes.png").write_text("not a picture")
    bad: list[tuple[Any, str]] = [
        (tmp_path / "notes.png", r"notes\.png: expected a readable image"),
        (tmp_path / "none.png", r"none\.png: expected an image file, found none"),
        (tmp_path, "expected an image file, found none"),
        (b"bytes", r"images\[0\]: expected a path, PIL image or array, got bytes"),
        (np.zeros((8, 8, 3)), r"images\[0\]: expected dtype uint8, got float64"),
        (np.zeros((8, 8, 5), np.uint8), r"images\[0\]: expected shape \(height, width, channels\)"),
        (np.zeros((0, 8, 3), np.uint8), r"images\[0\]: expected 1 to .* pixels, got 8 x 0"),
        (np.zeros((1, 300, 3), np.uint8), "expected an aspect ratio of at most 200, got 300 x 1"),
    ]
    for image, message in bad:
        with pytest.raises(ValueError, match=message):
            processor("<|image_pad|>", [image])


def test_an_image_beyond_max_pixels_is_refused_before_it_is_decoded(
    png: Path, processor: Qwen2VLProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "MAX_IMAGE_PIXELS", 60 * 80 - 1)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="80 x 60 pixels, more than 4799"):
        processor("<|image_pad|>", [png])
    with pytest.raises(ValueError, match="expected 1 to 4799 pixels"):
        processor("<|image_pad|>", [cases.picture(60, 80)])


def test_the_total_of_all_pictures_can_be_limited(processor: Qwen2VLProcessor) -> None:
    pictures = [cases.picture(56, 56)] * 3
    text = "<|image_pad|>" * 3
    processor(text, pictures, max_total_pixels=3 * 56 * 56)
    with pytest.raises(
        ValueError, match="max_total_pixels = 9407 after resizing, got at least 9408"
    ):
        processor(text, pictures, max_total_pixels=3 * 56 * 56 - 1)


def test_pictures_and_placeholders_must_match(processor: Qwen2VLProcessor) -> None:
    frame = cases.picture(56, 56)
    for text, given, videos, message in (
        ("none", [frame], None, r"expected 1 <\|image_pad\|> \(one each\), got 0"),
        ("<|image_pad|><|image_pad|>", [frame], None, "expected 1 .*, got 2"),
        ("<|video_pad|>", None, None, r"expected 0 <\|video_pad\|>"),
        ("<|video_pad|>", None, [[]], r"videos\[0\]: expected at least one frame"),
        ("<|video_pad|>", None, [[frame, frame[:28]]], r"videos\[0\]: expected frames of one size"),
        ("<|video_pad|>", None, ["nowhere"], "nowhere: expected a directory of frames"),
    ):
        with pytest.raises(ValueError, match=message):
            processor(text, given, videos)
    with pytest.raises(ValueError, match="text: expected at least one"):
        processor([])
    with pytest.raises(ValueError, match="padding_side: expected 'left' or 'right'"):
        processor(["a", "b c"], padding_side="middle")


def test_a_folder_without_a_usable_tokenizer(checkpoint_dir: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(checkpoint_dir, tmp_path / "copy"))
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [
        t for t in tokenizer["added_tokens"] if "image" not in t["content"]
    ]
    del tokenizer["model"]["vocab"]["<|image_pad|>"]
    for content, message in (
        (json.dumps(tokenizer), r"tokenizer: expected a token '<\|image_pad\|>', found none"),
        ("{", r"tokenizer\.json cannot be read"),
        (None, r"tokenizer: expected .*tokenizer\.json, found none"),
    ):
        (path / "tokenizer.json").unlink()
        if content is not None:
            (path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            load_processor(path)
        (path / "tokenizer.json").touch()


def test_a_tokenizer_that_truncates_does_not(checkpoint_dir: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(checkpoint_dir, tmp_path / "copy"))
    expected = load_processor(path)("What is in the picture?")["input_ids"]
    backend = load_processor(path).tokenizer.backend
    backend.enable_truncation(2)
    backend.save(str(path / "tokenizer.json"))
    assert (
        load_processor(path)("What is in the picture?")["input_ids"].tolist() == expected.tolist()
    )


def test_chat_templates_run_in_a_sandbox(processor: Qwen2VLProcessor) -> None:
    tokenizer = load_tokenizer_with("{{ messages.__class__.__mro__ }}", processor)
    with pytest.raises(ValueError, match=r"chat template: .*unsafe"):
        tokenizer.apply_chat_template([])
    tokenizer = load_tokenizer_with("{{ raise_exception('roles must alternate') }}", processor)
    with pytest.raises(ValueError, match="chat template: roles must alternate"):
        tokenizer.apply_chat_template([])
    tokenizer = load_tokenizer_with("", processor)
    with pytest.raises(ValueError, match="chat template: the checkpoint has none"):
        tokenizer.apply_chat_template([])


def load_tokenizer_with(template: str, processor: Qwen2VLProcessor) -> Any:
    from vlmkernels.models.tokenizer import Tokenizer

    return Tokenizer(processor.tokenizer.backend, chat_template=template)
