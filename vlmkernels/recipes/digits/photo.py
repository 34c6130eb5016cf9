"""A photo or scan of digits, brought into the form of the training scans.

The UCI scans were made from forms: each digit was cut out, scaled to fill a 32x32 bitmap, and ink
was counted in 4x4 blocks. `normalise` does the same to a picture of any size: even out the light,
separate ink from paper, cut the ink into digits and rows, and count the ink of each in 8x8 blocks.
It is for dark or light ink on a plain ground, digits that do not touch, at most MAX_DIGITS.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from vlmkernels.models.images import load_rgb

from .data import CELL, MAX_COLUMNS, MAX_DIGITS, MAX_ROWS

WORKING_SIDE = 320  # px: larger pictures are shrunk to this before ink is looked for
MIN_CONTRAST = 30  # grey levels between ink and paper

Grey = NDArray[np.float64]


@dataclass
class Box:
    """Bounding box of one piece of ink, ends exclusive, and the ink in it."""

    top: int
    bottom: int
    left: int
    right: int
    ink: Grey

    @property
    def height(self) -> int:
        return self.bottom - self.top


def normalise(image: object) -> NDArray[np.uint8]:
    """Picture (a path, PIL image or array) -> canvas (height, width) uint8, light ink on black.

    Raises ValueError: not a readable image, no ink found, more digits than the model has learned.
    """
    grey = np.asarray(Image.fromarray(load_rgb(image)).convert("L"))
    ink = _ink(grey)
    rows = _rows(_join(_pieces(ink)))
    count = sum(map(len, rows))
    if count == 0:
        raise ValueError("image: expected digits on a plain ground, found no ink")
    if count > MAX_DIGITS or len(rows) > MAX_ROWS or max(map(len, rows)) > MAX_COLUMNS:
        raise ValueError(
            f"image: expected at most {MAX_DIGITS} digits in {MAX_ROWS} rows, found {count} pieces "
            f"of ink in {len(rows)}"
        )
    canvas = np.zeros((CELL * len(rows), CELL * max(map(len, rows))), np.uint8)
    for i, row in enumerate(rows):
        for j, box in enumerate(row):
            place = slice(CELL * i, CELL * (i + 1)), slice(CELL * j, CELL * (j + 1))
            canvas[place] = _scan(box.ink)
    return canvas


def _ink(grey: NDArray[np.uint8]) -> Grey:
    """0 on paper to 1 on full ink. Paper is what a wide median filter leaves."""
    picture = Image.fromarray(grey)
    if max(picture.size) > WORKING_SIDE:
        picture.thumbnail((WORKING_SIDE, WORKING_SIDE), Image.Resampling.BOX)
    values = np.asarray(picture, dtype=np.float64)
    difference = values - _paper(picture)
    dark, light = -np.percentile(difference, 0.5), np.percentile(difference, 99.5)
    difference = -difference if dark > light else difference
    if max(dark, light) < MIN_CONTRAST:
        return np.zeros(values.shape)
    threshold = _otsu(difference.clip(0))
    full = np.percentile(difference[difference > threshold], 75)
    # A little below the threshold: the soft edge of a stroke is ink as well.
    return np.where(difference > 0.7 * threshold, (difference / full).clip(0, 1), 0.0)


def _paper(picture: Image.Image) -> Grey:
    """The ground under the ink, smooth over a quarter of the picture."""
    small = picture.resize(
        (max(1, picture.width // 8), max(1, picture.height // 8)), Image.Resampling.BOX
    )
    window = max(3, min(small.size) // 2) | 1
    # Repeat the edge: the filter leaves a border of half its window as it is.
    padded = Image.fromarray(np.pad(np.asarray(small), window // 2, mode="edge"))
    smooth = padded.filter(ImageFilter.MedianFilter(min(window, 31)))
    half = window // 2
    smooth = smooth.crop((half, half, half + small.width, half + small.height))
    return np.asarray(smooth.resize(picture.size, Image.Resampling.BILINEAR), dtype=np.float64)


def _otsu(values: Grey) -> float:
    """The threshold that splits `values` into two classes with the least variance inside them."""
    counts, edges = np.histogram(values, bins=256)
    middle = (edges[:-1] + edges[1:]) / 2
    below = counts.cumsum()
    above = below[-1] - below
    sums = (counts * middle).cumsum()
    mean_below = sums / np.maximum(below, 1)
    mean_above = (sums[-1] - sums) / np.maximum(above, 1)
    return float(edges[1 + int(np.argmax(below * above * (mean_below - mean_above) ** 2))])


def _pieces(ink: Grey) -> list[Box]:
    """Connected pieces of ink (8 neighbours), specks left out."""
    padded = np.pad(ink, 1)
    labels = np.zeros(padded.shape, np.int64)
    pieces: list[Box] = []
    for start in zip(*padded.nonzero(), strict=True):
        if labels[start]:
            continue
        labels[start] = label = len(pieces) + 1
        stack, pixels = [start], []
        while stack:
            y, x = stack.pop()
            pixels.append((y - 1, x - 1))
            for near in [(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]:
                if padded[near] and not labels[near]:
                    labels[near] = label
                    stack.append(near)
        pieces.append(_box(ink, np.array(pixels)))
    tallest = max((p.height for p in pieces), default=0)
    return [p for p in pieces if p.height >= max(4, tallest // 6)]


def _box(ink: Grey, pixels: NDArray[np.int64]) -> Box:
    top, left = pixels.min(axis=0)
    bottom, right = pixels.max(axis=0) + 1
    own = np.zeros((bottom - top, right - left))
    own[pixels[:, 0] - top, pixels[:, 1] - left] = ink[pixels[:, 0], pixels[:, 1]]
    return Box(int(top), int(bottom), int(left), int(right), own)


def _join(pieces: list[Box]) -> list[Box]:
    """One box for what belongs together: a broken stroke lies over or under its digit, close by."""
    pieces = sorted(pieces, key=lambda p: -p.height)
    tall = pieces[0].height if pieces else 0
    joined: list[Box] = []
    for piece in pieces:
        for i, other in enumerate(joined):
            across = min(piece.right, other.right) - max(piece.left, other.left)
            apart = max(piece.top, other.top) - min(piece.bottom, other.bottom)
            narrow = min(piece.right - piece.left, other.right - other.left)
            together = max(piece.bottom, other.bottom) - min(piece.top, other.top)
            if across > 0.5 * narrow and apart < 0.2 * tall and together < 1.3 * tall:
                joined[i] = _union(piece, other)
                break
        else:
            joined.append(piece)
    return joined


def _union(a: Box, b: Box) -> Box:
    top, left = min(a.top, b.top), min(a.left, b.left)
    bottom, right = max(a.bottom, b.bottom), max(a.right, b.right)
    ink = np.zeros((bottom - top, right - left))
    for box in (a, b):
        place = (
            slice(box.top - top, box.bottom - top),
            slice(box.left - left, box.right - left),
        )
        ink[place] += box.ink
    return Box(top, bottom, left, right, ink)


def _rows(boxes: list[Box]) -> list[list[Box]]:
    """Reading order: a box whose middle lies within a row's height belongs to that row."""
    rows: list[list[Box]] = []
    for box in sorted(boxes, key=lambda b: -b.height):
        middle = (box.top + box.bottom) / 2
        for row in rows:
            if row[0].top <= middle < row[0].bottom:
                row.append(box)
                break
        else:
            rows.append([box])
    rows.sort(key=lambda row: row[0].top)
    return [sorted(row, key=lambda b: b.left) for row in rows]


def _scan(ink: Grey) -> NDArray[np.uint8]:
    """One digit -> (8, 8) uint8: the ink in each of 8x8 blocks, aspect kept, centred."""
    height, width = ink.shape
    side = max(height, width)
    square = np.zeros((side, side), np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = (255 * ink).round()
    return np.asarray(Image.fromarray(square).resize((CELL, CELL), Image.Resampling.BOX))
