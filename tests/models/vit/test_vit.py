"""ViT against transformers, on checkpoints that transformers wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

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
from vlmkernels.models.vit import ViT, ViTConfig, ViTProcessor
from vlmkernels.models.vit.weights import own_name

SIZES = {"image_size": 32, "patch_size": 8, "num_hidden_layers": 3, "intermediate_size": 48}
NAMES = """
vit.embeddings.cls_token vit.embeddings.position_embeddings
vit.embeddings.patch_embeddings.projection.wb
vit.encoder.layer.N.attention.attention.query.wb vit.encoder.layer.N.attention.attention.key.wb
vit.encoder.layer.N.attention.attention.value.wb vit.encoder.layer.N.attention.output.dense.wb
vit.encoder.layer.N.intermediate.dense.wb vit.encoder.layer.N.output.dense.wb
vit.encoder.layer.N.layernorm_before.wb vit.encoder.layer.N.layernorm_after.wb
vit.layernorm.wb classifier.wb
"""


def write(path: Path, make: Any = transformers.ViTForImageClassification, **options: Any) -> Any:
    options = SIZES | {"hidden_size": 32, "num_attention_heads": 2, "num_labels": 5} | options
    hf_model = make(transformers.ViTConfig(**options))
    randomize(hf_model)
    hf_model.save_pretrained(path)
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(path)
    return hf_model.eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("vit")
    return path, write(path)


def pixels(height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.randn(3, 3, height, width, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("size", [(32, 32), (48, 40), (67, 33)], ids=str)
def test_logits_loss_and_gradients_match_transformers(
    size: tuple[int, int], checkpoint: tuple[Path, Any]
) -> None:
    path, hf_model = checkpoint
    model, labels = load(path), torch.tensor([0, 4, 2])
    options = {"labels": labels, "interpolate_pos_encoding": size != (32, 32)}
    ours, theirs = model(pixels(*size), **options), hf_model(pixels(*size), **options)
    hf_model.zero_grad()
    ours.loss.backward()
    theirs.loss.backward()
    assert theirs.logits.std() > 0.3
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=1e-5)
    assert_grads_match(model, hf_model, own_name)


@pytest.mark.parametrize(("hidden", "heads"), [(64, 1), (80, 1), (48, 6)])
def test_head_dims_and_no_qkv_bias(hidden: int, heads: int, tmp_path: Path) -> None:
    options = {"hidden_size": hidden, "num_attention_heads": heads, "qkv_bias": False}
    hf_model = write(tmp_path, **options)
    torch.testing.assert_close(
        load(tmp_path)(pixels()).logits, hf_model(pixels()).logits, rtol=0, atol=1e-4
    )


def test_an_encoder_alone_with_its_pooler(tmp_path: Path) -> None:
    hf_model = write(tmp_path / "theirs", transformers.ViTModel)
    model = load(tmp_path / "theirs")
    ours, theirs = model(pixels()), hf_model(pixels())
    assert ours.logits is None
    torch.testing.assert_close(ours.last_hidden_state, theirs.last_hidden_state, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.pooled, theirs.pooler_output, rtol=0, atol=1e-4)
    model.save_pretrained(tmp_path / "ours")
    assert state_of(tmp_path / "ours").keys() == state_of(tmp_path / "theirs").keys()
    with pytest.raises(ValueError, match="labels: expected None"):
        model(pixels(), labels=torch.zeros(3, dtype=torch.int64))


def test_round_trip_through_transformers(checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    path, hf_model = checkpoint
    load(path).save_pretrained(tmp_path / "ours", max_shard_bytes=20_000)
    ours, theirs = state_of(tmp_path / "ours"), state_of(path)
    assert ours.keys() == theirs.keys() == template_names(NAMES, 3)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    again, report = transformers.ViTForImageClassification.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    torch.testing.assert_close(again(pixels()).logits, hf_model(pixels()).logits)


def test_a_new_model_is_readable_by_transformers(tmp_path: Path) -> None:
    config = ViTConfig(hidden_size=32, num_attention_heads=2, num_labels=7, **SIZES)
    model = ViT(config)
    randomize(model)
    model.save_pretrained(tmp_path)
    theirs = transformers.ViTForImageClassification.from_pretrained(tmp_path)
    assert load(tmp_path).config == config
    torch.testing.assert_close(model(pixels()).logits, theirs(pixels()).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "image_size", "parameters"),
    [
        ("B/16", 224, 86_567_656),
        ("B/16", 384, 86_859_496),
        ("B/32", 224, 88_224_232),
        ("B/32", 384, 88_297_192),
        ("L/16", 224, 304_326_632),
        ("L/16", 384, 304_715_752),
        ("L/32", 224, 306_535_400),
        ("L/32", 384, 306_632_680),
        ("H/14", 224, 632_045_800),
        ("H/14", 384, 632_651_240),
    ],
)
def test_published_sizes_have_the_published_parameters(
    name: str, image_size: int, parameters: int
) -> None:
    config = ViTConfig.preset(name, image_size=image_size)
    assert num_parameters(lambda: ViT(config)) == parameters
    names = ViT.on_meta(config).state_dict().keys()
    assert names == template_names(NAMES, config.num_hidden_layers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_stay_close_to_float32(dtype: torch.dtype, checkpoint: tuple[Path, Any]) -> None:
    half, full = load(checkpoint[0], dtype=dtype), load(checkpoint[0])
    logits = half(pixels()).logits
    assert logits.dtype == dtype
    expected = full(pixels()).logits
    assert (logits.float() - expected).norm() < 0.03 * expected.norm()


def test_autocast_trains_close_to_float32(checkpoint: tuple[Path, Any]) -> None:
    model, grads = load(checkpoint[0]), []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            model(pixels(), labels=torch.tensor([0, 4, 2])).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in grads[0].items():
        if not name.endswith("key.bias"):  # rounding noise: it shifts all scores of a query alike
            assert (grads[1][name] - expected).norm() < 0.05 * expected.norm(), name


def test_compiled_and_recomputed_gradients_are_the_same(checkpoint: tuple[Path, Any]) -> None:
    model, labels = load(checkpoint[0]), torch.tensor([0, 4, 2])
    assert_compiles_and_recomputes(model, lambda run: run(pixels(), labels=labels).loss)


@pytest.mark.parametrize("size", [(32, 32), (37, 91), (200, 33)], ids=str)
def test_pixels_are_bit_equal_to_transformers(
    size: tuple[int, int], checkpoint: tuple[Path, Any]
) -> None:
    theirs = transformers.ViTImageProcessorPil.from_pretrained(checkpoint[0])
    images = [Image.fromarray(picture(*size)), Image.fromarray(picture(40, 40, seed=1))]
    expected = theirs(images, return_tensors="pt")["pixel_values"]
    assert torch.equal(load_processor(checkpoint[0])(images)["pixel_values"], expected)


def test_old_and_new_settings_read_alike_and_survive(tmp_path: Path) -> None:
    settings = {"size": 384, "resample": 2, "image_mean": [0.5] * 3, "do_resize": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    old = ViTProcessor.from_pretrained(tmp_path)
    assert old.image.size == (384, 384)
    old.save_pretrained(tmp_path)
    assert ViTProcessor.from_pretrained(tmp_path).image == old.image
    assert transformers.ViTImageProcessorPil.from_pretrained(tmp_path).size["height"] == 384


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"pixel_values": torch.zeros(3, 32, 32)}, ValueError, r"expected shape \(num_images, 3"),
    ({"pixel_values": pixels(40, 32)}, ValueError, "expected images of 32 x 32, got 40 x 32"),
    ({"pixel_values": pixels().byte()}, TypeError, "expected floating point, got torch.uint8"),
    ({"pixel_values": pixels(), "labels": torch.zeros(2)}, ValueError, "labels: expected shape"),
]


@pytest.mark.parametrize(("inputs", "error", "message"), BAD, ids=[c[2] for c in BAD])
def test_wrong_arguments_are_named(
    inputs: dict[str, Any], error: type[Exception], message: str, checkpoint: tuple[Path, Any]
) -> None:
    with pytest.raises(error, match=message):
        load(checkpoint[0])(**inputs)


def test_wrong_configs_are_named(checkpoint: tuple[Path, Any]) -> None:
    raw = json.loads((checkpoint[0] / "config.json").read_text())
    for change, message in (
        ({"hidden_size": 33}, "hidden_size: expected a multiple of num_attention_heads"),
        ({"patch_size": 64}, "image_size: expected at least patch_size"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps: expected a positive number"),
    ):
        with pytest.raises(ValueError, match=message):
            ViTConfig.from_dict(raw | change)
    with pytest.raises(ValueError, match="preset: expected one of"):
        ViTConfig.preset("B/8")


def test_labels_of_many_classes_and_their_names(checkpoint: tuple[Path, Any]) -> None:
    model = load(checkpoint[0])
    wanted = torch.tensor(np.eye(5)[:3])
    loss = model(pixels(), labels=wanted).loss
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        model(pixels()).logits, wanted.float()
    )
    torch.testing.assert_close(loss, expected)
    assert model.config.label(3) == "LABEL_3"
