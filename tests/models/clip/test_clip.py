"""CLIP against transformers, on checkpoints that transformers wrote."""

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

from tests.models.clip.conftest import write
from tests.models.common import (
    assert_compiles_and_recomputes,
    assert_grads_match,
    num_parameters,
    picture,
    randomize,
    state_of,
    template_names,
)
from vlmkernels.models import load, load_processor
from vlmkernels.models.clip import Clip, ClipConfig, ClipTextConfig, ClipVisionConfig

LAYER = """
M.encoder.layers.N.self_attn.q_proj.wb M.encoder.layers.N.self_attn.k_proj.wb
M.encoder.layers.N.self_attn.v_proj.wb M.encoder.layers.N.self_attn.out_proj.wb
M.encoder.layers.N.layer_norm1.wb M.encoder.layers.N.layer_norm2.wb
M.encoder.layers.N.mlp.fc1.wb M.encoder.layers.N.mlp.fc2.wb
"""
VISION = LAYER.replace("M.", "vision_model.")
TEXT = LAYER.replace("M.", "text_model.")
REST = """
logit_scale visual_projection.weight text_projection.weight
text_model.embeddings.token_embedding.weight text_model.embeddings.position_embedding.weight
text_model.final_layer_norm.wb vision_model.embeddings.class_embedding
vision_model.embeddings.patch_embedding.weight vision_model.embeddings.position_embedding.weight
vision_model.pre_layrnorm.wb vision_model.post_layernorm.wb
"""
TEXTS = ["a photo of a cat.", "the red dog", "two"]


def published_names(config: ClipConfig) -> set[str]:
    vision = template_names(VISION, config.vision.num_hidden_layers)
    return vision | template_names(TEXT, config.text.num_hidden_layers) | template_names(REST, 0)


def make_inputs(path: Path, size: tuple[int, int] = (32, 32)) -> dict[str, torch.Tensor]:
    inputs = load_processor(path)(TEXTS)
    generator = torch.Generator().manual_seed(5)
    return inputs | {"pixel_values": torch.randn(3, 3, *size, generator=generator)}


@pytest.mark.parametrize("size", [(32, 32), (48, 40)], ids=str)
def test_embeddings_logits_loss_and_gradients_match_transformers(
    size: tuple[int, int], checkpoint_dir: Path, hf_model: Any
) -> None:
    model = load(checkpoint_dir)
    inputs = make_inputs(checkpoint_dir, size)
    options = {"return_loss": True, "interpolate_pos_encoding": size != (32, 32)}
    hf_model.zero_grad()
    ours, theirs = model(**inputs, **options), hf_model(**inputs, **options)
    ours.loss.backward()
    theirs.loss.backward()
    assert theirs.logits_per_image.std() > 0.5
    for name in ("image_embeds", "text_embeds", "logits_per_image", "logits_per_text", "loss"):
        a, b = getattr(ours, name), getattr(theirs, name)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4, msg=name)
    assert_grads_match(model, hf_model)
    assert model.logit_scale.grad != 0


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_the_checkpoint_says_which_gelu_and_which_end(act: str, tmp_path: Path) -> None:
    hf_model = write(tmp_path, hidden_act=act, eos_token_id=2)
    inputs = make_inputs(tmp_path)
    ours, theirs = load(tmp_path)(**inputs), hf_model(**inputs)
    torch.testing.assert_close(ours.logits_per_text, theirs.logits_per_text, rtol=0, atol=1e-4)


def test_a_text_does_not_depend_on_its_batch_or_mask(checkpoint_dir: Path) -> None:
    model, processor = load(checkpoint_dir), load_processor(checkpoint_dir)
    batch = processor(TEXTS)
    together = model.encode_text(**batch)
    alone = torch.cat([model.encode_text(processor(t)["input_ids"]) for t in TEXTS])
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(model.encode_text(batch["input_ids"]), alone)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(3))
    raw = model.encode_text(**batch, normalize=False)
    torch.testing.assert_close(raw / raw.norm(dim=1, keepdim=True), together)


def test_round_trip_through_transformers(
    checkpoint_dir: Path, hf_model: Any, tmp_path: Path
) -> None:
    load(checkpoint_dir).save_pretrained(tmp_path / "ours")
    ours, theirs = state_of(tmp_path / "ours"), state_of(checkpoint_dir)
    assert ours.keys() == theirs.keys() == published_names(load(checkpoint_dir).config)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    again, report = transformers.CLIPModel.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert again.config.text_config == hf_model.config.text_config


def test_a_new_model_is_readable_by_transformers(checkpoint_dir: Path, tmp_path: Path) -> None:
    config = load(checkpoint_dir).config
    model = Clip(ClipConfig(24, text=config.text, vision=config.vision)).eval()
    randomize(model)
    model.save_pretrained(tmp_path)
    inputs = make_inputs(checkpoint_dir)
    theirs = transformers.CLIPModel.from_pretrained(tmp_path)(**inputs).logits_per_text
    torch.testing.assert_close(model(**inputs).logits_per_text, theirs, rtol=0, atol=1e-4)


def test_a_new_model_starts_near_the_published_temperature() -> None:
    text = ClipTextConfig(vocab_size=100, num_hidden_layers=2, eos_token_id=99)
    model = Clip(ClipConfig(text=text, vision=ClipVisionConfig(num_hidden_layers=2)))
    pixels = torch.randn(2, 3, 224, 224)
    ids = torch.randint(0, 98, (2, 8))
    ids[:, -1] = 99
    with torch.no_grad():
        loss = model(ids, pixels, return_loss=True).loss
    assert 0 < loss < 2  # chance is log 2
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("B/32", 151_277_313),
        ("B/16", 149_620_737),
        ("L/14", 427_616_513),
        ("L/14-336", 427_944_193),
        ("H/14", 986_109_441),
        ("bigG/14", 2_539_567_105),
    ],
)
def test_published_sizes_have_the_published_parameters(name: str, parameters: int) -> None:
    config = ClipConfig.preset(name)
    assert num_parameters(lambda: Clip(config)) == parameters
    assert Clip.on_meta(config).state_dict().keys() == published_names(config)


def test_older_files_say_a_tower_twice_and_hold_an_index(
    checkpoint_dir: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(checkpoint_dir, tmp_path / "old"))
    raw = json.loads((path / "config.json").read_text())
    raw["text_config_dict"], raw["vision_config_dict"] = raw.pop("text_config"), None
    (path / "config.json").write_text(json.dumps(raw))
    state = state_of(path) | {"text_model.embeddings.position_ids": torch.arange(16)[None]}
    save_file(state, path / "model.safetensors")
    assert load(path).config == load(checkpoint_dir).config


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_stay_close_to_float32(dtype: torch.dtype, checkpoint_dir: Path) -> None:
    inputs = make_inputs(checkpoint_dir)
    half, full = load(checkpoint_dir, dtype=dtype)(**inputs), load(checkpoint_dir)(**inputs)
    assert half.image_embeds.dtype == dtype
    for name in ("image_embeds", "text_embeds"):
        a, b = getattr(half, name).float(), getattr(full, name)
        assert (a - b).norm() < 0.03 * b.norm(), name


def test_autocast_trains_close_to_float32(checkpoint_dir: Path) -> None:
    model, inputs, grads = load(checkpoint_dir), make_inputs(checkpoint_dir), []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            model(**inputs, return_loss=True).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in grads[0].items():
        if not name.endswith("k_proj.bias"):  # rounding noise
            assert (grads[1][name] - expected).norm() < 0.1 * expected.norm(), name


def test_compiled_and_recomputed_gradients_are_the_same(checkpoint_dir: Path) -> None:
    inputs = make_inputs(checkpoint_dir)
    del inputs["attention_mask"]
    model = load(checkpoint_dir)
    assert_compiles_and_recomputes(model, lambda run: run(**inputs, return_loss=True).loss)


@pytest.mark.parametrize("size", [(32, 32), (37, 91), (200, 33), (20, 25), (31, 90)], ids=str)
@pytest.mark.parametrize("resize", [True, False])
def test_pixels_are_bit_equal_to_transformers(
    size: tuple[int, int], resize: bool, checkpoint_dir: Path
) -> None:
    theirs = transformers.CLIPImageProcessorPil.from_pretrained(checkpoint_dir, do_resize=resize)
    ours = load_processor(checkpoint_dir)
    ours.image.do_resize = resize
    images = [Image.fromarray(picture(*size)), Image.fromarray(picture(40, 47, seed=1))]
    expected = theirs(images, return_tensors="pt")["pixel_values"]
    assert torch.equal(ours(images=images)["pixel_values"], expected)


def test_tokens_match_transformers_and_long_texts_keep_their_end(checkpoint_dir: Path) -> None:
    theirs = transformers.CLIPTokenizer.from_pretrained(checkpoint_dir)
    texts = [*TEXTS, "A Photo of the red CAR. " * 8]
    expected = theirs(texts, padding=True, truncation=True, return_tensors="pt")
    ours = load_processor(checkpoint_dir)(texts)
    assert torch.equal(ours["input_ids"], expected["input_ids"])
    assert torch.equal(ours["attention_mask"], expected["attention_mask"])
    assert ours["input_ids"].shape[1] == 16


def test_a_saved_processor_is_the_same(checkpoint_dir: Path, tmp_path: Path) -> None:
    processor = load_processor(checkpoint_dir)
    processor.save_pretrained(tmp_path)
    shutil.copy(checkpoint_dir / "config.json", tmp_path)
    again = load_processor(tmp_path)
    assert again.image == processor.image and again.max_seqlen == 16
    assert again(TEXTS)["input_ids"].tolist() == processor(TEXTS)["input_ids"].tolist()
    images = [Image.fromarray(picture(37, 91))]
    theirs = transformers.CLIPImageProcessorPil.from_pretrained(tmp_path)
    expected = theirs(images, return_tensors="pt")["pixel_values"]
    assert torch.equal(again(images=images)["pixel_values"], expected)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"pixel_values": torch.zeros(3, 3, 40, 32)}, ValueError, "expected images of 32 x 32"),
    ({"pixel_values": torch.zeros(2, 3, 32, 32)}, ValueError, "3 texts and 2 images"),
    ({"input_ids": torch.full((3, 4), 999)}, ValueError, r"input_ids: expected in \[0"),
    ({"input_ids": torch.zeros(3, 17, dtype=torch.int64)}, ValueError, "at most 16 tokens, got 17"),
    ({"input_ids": torch.zeros(3, 4)}, TypeError, "input_ids: expected int32 or int64"),
    ({"attention_mask": torch.ones(3, 1)}, ValueError, "attention_mask: expected shape"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[c[2] for c in BAD])
def test_wrong_arguments_are_named(
    change: dict[str, Any], error: type[Exception], message: str, checkpoint_dir: Path
) -> None:
    inputs = make_inputs(checkpoint_dir)
    if "input_ids" in change:
        del inputs["attention_mask"]
    with pytest.raises(error, match=message):
        load(checkpoint_dir)(**inputs | change, return_loss=True)


def test_wrong_configs_are_named(checkpoint_dir: Path) -> None:
    raw = json.loads((checkpoint_dir / "config.json").read_text())
    for change, message in (
        ({"vision_config": {"hidden_size": 33}}, "vision_config.hidden_size: expected a multiple"),
        ({"text_config": [1]}, r"text_config: expected an object, got \[1\]"),
        ({"projection_dim": 0}, "projection_dim: expected a positive integer"),
    ):
        with pytest.raises(ValueError, match=message):
            ClipConfig.from_dict(raw | change)
    with pytest.raises(ValueError, match="preset: expected one of"):
        ClipConfig.preset("B/8")
