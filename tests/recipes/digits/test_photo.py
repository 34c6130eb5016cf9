"""Pictures of digits as a user would bring them: large, dark on light, unevenly lit."""

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from vlmkernels.recipes.digits.data import load_scans
from vlmkernels.recipes.digits.photo import normalise

SCALE = 15  # a scan becomes 120 px


def page(rows: list[list[int]], *, dark_ink: bool = True, seed: int = 0) -> Image.Image:
    """Held-out scans enlarged and written by an unsteady hand on unevenly lit paper."""
    pixels = load_scans()[1].pixels
    rng = np.random.default_rng(seed)
    side = 8 * SCALE
    ink = np.zeros((len(rows) * 14 * SCALE, max(map(len, rows)) * 12 * SCALE))
    for i, row in enumerate(rows):
        for j, scan in enumerate(row):
            large = Image.fromarray(pixels[scan]).resize((side, side), Image.Resampling.BICUBIC)
            top = 14 * SCALE * i + int(rng.integers(3 * SCALE))
            left = 12 * SCALE * j + int(rng.integers(3 * SCALE))
            ink[top : top + side, left : left + side] = np.asarray(large)
    light = np.linspace(120, 240, ink.shape[1]) * np.linspace(0.8, 1, ink.shape[0])[:, None]
    grey = light * (1 - 0.7 * ink / 255) if dark_ink else 10 + light / 4 + 0.7 * ink
    grey += rng.normal(0, 5, ink.shape)
    return Image.fromarray(grey.clip(0, 255).astype(np.uint8))


def cells(canvas: NDArray[np.uint8]) -> list[NDArray[np.float64]]:
    h, w = canvas.shape
    blocks = canvas.reshape(h // 8, 8, w // 8, 8).transpose(0, 2, 1, 3).reshape(-1, 8, 8)
    return [block.astype(float) for block in blocks]


@pytest.mark.parametrize("dark_ink", [True, False])
@pytest.mark.parametrize(
    "rows", [[[3]], [[0, 1, 2]], [[5], [6]], [[7, 8, 9], [10, 11, 12]], [[20, 21], [22, 23]]]
)
def test_each_digit_lands_in_its_cell(rows: list[list[int]], dark_ink: bool) -> None:
    canvas = normalise(page(rows, dark_ink=dark_ink))
    assert canvas.shape == (8 * len(rows), 8 * len(rows[0]))
    scans = load_scans()[1].pixels.astype(float)
    for cell, scan in zip(cells(canvas), chain(*rows), strict=True):
        # A scan is not always centred in its own box.
        shifted = [np.roll(cell, shift, axis=1).ravel() for shift in (-1, 0, 1)]
        assert max(np.corrcoef(s, scans[scan].ravel())[0, 1] for s in shifted) > 0.75


def test_a_short_row_leaves_black_cells() -> None:
    canvas = normalise(page([[0, 1], [2]]))
    assert canvas.shape == (16, 16)
    assert not canvas[8:, 8:].any()


@pytest.mark.parametrize("kind", ["jpeg", "rgba", "large", "array"])
def test_any_kind_of_picture(kind: str, tmp_path: Path) -> None:
    plain = page([[0, 1]])
    picture: object = plain
    if kind == "jpeg":
        picture = tmp_path / "page.jpg"
        plain.save(picture)
    elif kind == "rgba":
        picture = plain.convert("RGBA")
    elif kind == "large":
        picture = plain.resize((plain.width * 6, plain.height * 6))
    elif kind == "array":
        picture = np.asarray(plain)
    expected = normalise(plain).astype(float)
    assert np.abs(normalise(picture) - expected).mean() < 12


@pytest.mark.parametrize("grey", [0, 128, 255])
def test_a_blank_page_is_an_error(grey: int) -> None:
    with pytest.raises(ValueError, match="found no ink"):
        normalise(Image.new("L", (300, 200), grey))


def test_noise_alone_is_an_error() -> None:
    noise = np.random.default_rng(0).normal(200, 5, (200, 300)).clip(0, 255).astype(np.uint8)
    with pytest.raises(ValueError, match="found no ink"):
        normalise(noise)


def test_more_digits_than_learned_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected at most 6 digits"):
        normalise(page([[0, 1, 2, 3], [4, 5, 6, 7]]))


def test_one_pixel_is_an_error() -> None:
    with pytest.raises(ValueError, match="found no ink"):
        normalise(Image.new("L", (1, 1)))


def test_no_picture_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("3 7 1")
    with pytest.raises(ValueError, match=r"notes\.txt: expected a readable image"):
        normalise(file)
