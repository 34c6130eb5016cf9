"""Wrong arguments of what every model has: an error that names the argument."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlmkernels import models
from vlmkernels.recipes.digits import CHECKPOINT


@pytest.fixture(scope="module")
def model() -> Any:
    return models.load(CHECKPOINT)


@pytest.fixture(scope="module")
def processor() -> Any:
    return models.load_processor(CHECKPOINT)


@pytest.fixture(scope="module")
def inputs(processor: Any) -> dict[str, torch.Tensor]:
    image = {"type": "image", "image": Image.new("RGB", (64, 32))}
    return processor.from_messages([{"role": "user", "content": [image]}])


@pytest.mark.parametrize("load", [models.load, models.load_processor])
def test_path(load: Callable[..., Any]) -> None:
    for wrong in (None, 3):
        with pytest.raises(TypeError, match=f"^path: expected .* directory, got {wrong}"):
            load(wrong)


def test_a_dtype_is_no_string() -> None:
    with pytest.raises(ValueError, match=r"^dtype: expected one of .*, got 'bfloat16'"):
        models.load(CHECKPOINT, dtype="bfloat16")  # type: ignore[arg-type]


def test_texts(processor: Any) -> None:
    for wrong in (None, 3, [None], [["a"]]):
        with pytest.raises(TypeError, match=r"^text: expected a string or several, got "):
            processor(wrong)
    assert len(processor(x for x in ("a", "b"))["input_ids"]) == 2


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("pixel_values", torch.Tensor.numpy, "a torch.Tensor, got ndarray"),
        ("pixel_values", torch.Tensor.int, "floating point, got torch.int32"),
        ("image_grid_thw", torch.Tensor.tolist, "a torch.Tensor of integers, got list"),
        ("image_grid_thw", torch.Tensor.float, "a torch.Tensor of integers, got torch.float32"),
    ],
)
def test_pixels(
    model: Any, inputs: dict[str, torch.Tensor], name: str, change: Any, expected: str
) -> None:
    changed = {**inputs, name: change(inputs[name])}
    with pytest.raises(TypeError, match=f"^{name.removeprefix('image_')}: expected {expected}"):
        model(**changed)


def test_generator(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    with pytest.raises(TypeError, match=r"^generator: expected a torch.Generator, got 3"):
        model.generate(**inputs, temperature=1.0, generator=3)


def test_pixels_of_other_towers() -> None:
    config = models.vit.ViTConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        image_size=32, patch_size=16,
    )  # fmt: skip
    tower = models.vit.ViT(config)
    with pytest.raises(TypeError, match=r"^pixel_values: expected a torch.Tensor, got ndarray"):
        tower(np.zeros((1, 3, 32, 32), np.float32))
