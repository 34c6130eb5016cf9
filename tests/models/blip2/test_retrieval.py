"""BLIP-2's image-text retrieval against transformers, on checkpoints that transformers wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

from tests.models.blip2.conftest import pixels, write_tokenizer
from tests.models.common import assert_grads_match, picture, run_command, state_of
from vlmkernels.models import load, load_processor
from vlmkernels.models.blip2 import Blip2Config, Blip2Pretraining, Blip2Retrieval


def texts(count: int = 3, *, padded: bool = True) -> dict[str, torch.Tensor]:
    """Of 6, 4 and 2 words, padded on the right."""
    ids = torch.randint(1, 40, (count, 6), generator=torch.Generator().manual_seed(3))
    if not padded:
        return {"input_ids": ids}
    mask = torch.arange(6) < torch.tensor([6, 4, 2])[:count, None]
    return {"input_ids": ids.where(mask, 0), "attention_mask": mask.long()}


@pytest.mark.parametrize("match", [False, True], ids=["contrast", "match"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_logits_and_gradients_match_transformers(
    match: bool, padded: bool, retrieval_dir: Path, hf_retrieval: Any
) -> None:
    model, inputs = load(retrieval_dir), texts(padded=padded)
    inputs["attention_mask"] = inputs.get("attention_mask", torch.ones(3, 6, dtype=torch.int64))
    inputs |= {"pixel_values": pixels(3)}
    hf_retrieval.zero_grad()
    ours = model(**inputs, use_image_text_matching_head=match)
    theirs = hf_retrieval(**inputs, use_image_text_matching_head=match)
    assert theirs.logits_per_image.std() > 0.03
    torch.testing.assert_close(ours.logits_per_image, theirs.logits_per_image, rtol=0, atol=1e-5)
    weight = torch.randn_like(ours.logits_per_image)
    for logits in (ours.logits_per_image, theirs.logits_per_image):
        (logits * weight).sum().backward()
    assert_grads_match(model, hf_retrieval)
    if not match:
        torch.testing.assert_close(ours.image_embeds, theirs.image_embeds, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.text_embeds, theirs.text_embeds, rtol=0, atol=1e-5)


def test_placeholders_in_front_are_left_out(
    retrieval_dir: Path, hf_retrieval: Any, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(retrieval_dir, tmp_path / "with"))
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(raw | {"image_token_index": 39}))
    theirs = transformers.Blip2ForImageTextRetrieval.from_pretrained(path).eval()
    plain = texts()
    front = {"input_ids": torch.full((3, 4), 39), "attention_mask": torch.ones(3, 4).long()}
    inputs = {name: torch.cat([front[name], x], dim=1) for name, x in plain.items()}
    for match in (False, True):
        options = {"pixel_values": pixels(3), "use_image_text_matching_head": match}
        ours = load(path)(**inputs, **options).logits_per_image
        expected = theirs(**inputs, **options).logits_per_image
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
        without = load(retrieval_dir)(**plain, **options).logits_per_image
        torch.testing.assert_close(ours, without)


def test_embeddings_alone_are_those_of_the_comparison(retrieval_dir: Path) -> None:
    model, inputs = load(retrieval_dir), texts()
    both = model(pixels(2), **inputs)
    assert both.logits_per_image.shape == (2, 3)
    torch.testing.assert_close(model.encode_image(pixels(2)), both.image_embeds)
    torch.testing.assert_close(model.encode_text(**inputs), both.text_embeds)
    alone = model.encode_text(inputs["input_ids"][1:2, :4])
    torch.testing.assert_close(alone[0], both.text_embeds[1])
    with torch.no_grad():  # padding may hold anything
        model.embeddings.word_embeddings.weight[0] = torch.nan
    torch.testing.assert_close(model.encode_text(**inputs), both.text_embeds)


def test_round_trip_through_transformers(
    retrieval_dir: Path, hf_retrieval: Any, tmp_path: Path
) -> None:
    load(retrieval_dir).save_pretrained(tmp_path / "ours")
    ours, theirs = state_of(tmp_path / "ours"), state_of(retrieval_dir)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    again, report = transformers.Blip2ForImageTextRetrieval.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    inputs = texts() | {"pixel_values": pixels(3)}
    expected = hf_retrieval(**inputs).logits_per_image
    torch.testing.assert_close(again.eval()(**inputs).logits_per_image, expected)


def test_the_names_tell_what_an_old_config_does_not(retrieval_dir: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(retrieval_dir, tmp_path / "old"))
    raw = json.loads((path / "config.json").read_text())
    del raw["architectures"]
    write_tokenizer(path, "bert")
    (path / "config.json").write_text(json.dumps(raw))
    index = {"embeddings.position_ids": torch.arange(16)[None]}  # older files hold it
    save_file(state_of(path) | index, path / "model.safetensors")
    model = load(path)
    assert isinstance(model, Blip2Retrieval) and not isinstance(model, Blip2Pretraining)
    assert model.config.to_dict()["architectures"] == ["Blip2ForImageTextRetrieval"]
    assert load_processor(path).image_token_id is None


def test_the_command_line_wants_one_that_answers(
    retrieval_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = Path(shutil.copytree(retrieval_dir, tmp_path / "model"))
    write_tokenizer(path, "bert")
    Image.fromarray(picture(9, 9)).save(tmp_path / "a.png")
    args = ["ask", "--model", str(path), "--image", str(tmp_path / "a.png"), "What?"]
    code, _, err = run_command([*args, "--device", "cpu"], monkeypatch, capsys)
    assert code == 2 and "model: expected one that answers in text" in err


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_stay_close_to_float32(dtype: torch.dtype, retrieval_dir: Path) -> None:
    inputs = texts() | {"pixel_values": pixels(3)}
    half, full = load(retrieval_dir, dtype=dtype)(**inputs), load(retrieval_dir)(**inputs)
    assert half.image_embeds.dtype == dtype
    for name in ("image_embeds", "text_embeds"):
        a, b = getattr(half, name).float(), getattr(full, name)
        assert (a - b).norm() < 0.03 * b.norm(), name


def test_wrong_arguments_are_named(retrieval_dir: Path) -> None:
    model, inputs = load(retrieval_dir), texts() | {"pixel_values": pixels(3)}
    options: dict[str, Any]
    for options, error, message in (
        ({"input_ids": torch.full((3, 6), 40)}, ValueError, r"input_ids: expected in \[0, 40\)"),
        ({"input_ids": torch.zeros(3, 6)}, TypeError, "input_ids: expected int32 or int64"),
        ({"attention_mask": torch.ones(3, 5)}, ValueError, "attention_mask: expected shape"),
        ({"attention_mask": torch.zeros(3, 6)}, ValueError, "expected a token in every row"),
        (
            {"pixel_values": pixels(2), "use_image_text_matching_head": True},
            ValueError,
            "expected a text for each image, got 3 texts and 2 images",
        ),
        ({"pixel_values": pixels(3, 40, 32)}, ValueError, "expected images of 32 x 32"),
        (
            {"input_ids": torch.ones(3, 17, dtype=torch.int64), "attention_mask": None},
            ValueError,
            "at most 16 tokens, got 17",
        ),
    ):
        with pytest.raises(error, match=message):
            model(**inputs | options)
    with pytest.raises(ValueError, match="use_qformer_text_input: expected true"):
        Blip2Retrieval(Blip2Config(architecture="Blip2ForImageTextRetrieval"))
