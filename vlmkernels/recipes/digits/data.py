"""Real scanned digits on canvases of varying size and aspect, and three questions about each.

The scans are scikit-learn's copy of the UCI optical digits: 1,797 of them, 8x8, grey 0..16.
They are split into train and held-out *before* anything is composed. A scan is set on the
canvas at its own resolution, aligned with the 4-px patches of the vision tower.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CELL = 8  # px: side of a scan, and patch_size * spatial_merge_size, so one vision token per cell
STEP = 4  # px: patch_size; scans are placed at multiples of it
MAX_ROWS, MAX_COLUMNS = 3, 6  # digits per canvas, down and across
MAX_CELLS = (4, 8)  # canvas height and width in cells
MAX_DIGITS = 6
HELD_OUT = 450
SPLIT_SEED = 0

# The first phrasing of a kind is the one the demo asks.
QUESTIONS: dict[str, tuple[str, ...]] = {
    "read": (
        "Read the digits in reading order.",
        "Which digits do you see?",
        "What is written here?",
    ),
    "count": (
        "How many digits are there?",
        "Count the digits.",
        "What is the number of digits in the picture?",
    ),
    "largest": (
        "Which digit is the largest?",
        "What is the largest digit in the picture?",
        "Name the largest digit.",
    ),
}
# Reading is what takes long to learn, so most training examples ask for it.
TRAINING_SHARE = {"read": 0.6, "count": 0.15, "largest": 0.25}


@dataclass(frozen=True)
class Scans:
    """One side of the split: `pixels` (num_scans, 8, 8) uint8 0..255, `labels` (num_scans,)."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    index: NDArray[np.int64]  # (num_scans,): position in load_digits()

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Canvas:
    """A picture, `pixels` (height, width) uint8, and its digits in reading order."""

    pixels: NDArray[np.uint8]
    digits: tuple[int, ...]


@dataclass(frozen=True)
class Example:
    canvas: Canvas
    kind: str
    question: str
    answer: str


def load_scans() -> tuple[Scans, Scans]:
    """-> (train, held_out): 1,347 and 450 disjoint scans, the same on every machine."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise RuntimeError(
            "the scans come with scikit-learn: pip install 'vlmkernels[train]'"
        ) from error

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(pixels))
    held_out, train = np.sort(order[:HELD_OUT]), np.sort(order[HELD_OUT:])
    labels = digits.target.astype(np.int64)
    return Scans(pixels[train], labels[train], train), Scans(
        pixels[held_out], labels[held_out], held_out
    )


def answer(kind: str, digits: Sequence[int]) -> str:
    """The whole answer to a question of `kind` about a canvas that holds `digits`."""
    if kind == "read":
        return "".join(map(str, digits))
    if kind == "count":
        return str(len(digits))
    if kind == "largest":
        return str(max(digits))
    raise ValueError(f"kind: expected one of {list(QUESTIONS)}, got {kind!r}")


def _spread(rng: np.random.Generator, count: int, length: int) -> NDArray[np.int64]:
    """Starts of `count` boxes of 8 px that do not overlap within `length`, on the 4-px grid."""
    slack = (length - CELL * count) // STEP
    return STEP * np.sort(rng.integers(0, slack + 1, count)) + CELL * np.arange(count)


def _row_lengths(rng: np.random.Generator, count: int) -> list[int]:
    """Split `count` digits over a random number of rows of at most MAX_COLUMNS each."""
    fewest = -(-count // MAX_COLUMNS)
    num_rows = int(rng.integers(fewest, min(count, MAX_ROWS) + 1))
    lengths = [1] * num_rows
    for _ in range(count - num_rows):
        free = [row for row, length in enumerate(lengths) if length < MAX_COLUMNS]
        lengths[free[rng.integers(len(free))]] += 1
    return lengths


def compose(rng: np.random.Generator, pixels: NDArray[np.uint8], digits: Sequence[int]) -> Canvas:
    """Set the scans `pixels` (num_digits, 8, 8) in rows on a canvas of random size and contrast."""
    lengths = _row_lengths(rng, len(digits))
    needed = (len(lengths), max(lengths))
    height, width = (
        CELL * int(rng.integers(cells, min(cells + 2, most) + 1))
        for cells, most in zip(needed, MAX_CELLS, strict=True)
    )
    ink = np.zeros((height, width), np.float64)
    scans = iter(pixels)
    for length, top in zip(lengths, _spread(rng, len(lengths), height), strict=True):
        for left in _spread(rng, length, width):
            ink[top : top + CELL, left : left + CELL] = next(scans)
    background, contrast = rng.uniform(0, 40), rng.uniform(0.6, 1.0)
    noise = rng.normal(0, rng.uniform(0, 10), ink.shape)
    light = background + contrast * ink * (255 - background) / 255 + noise
    return Canvas(light.round().clip(0, 255).astype(np.uint8), tuple(map(int, digits)))


def distort(rng: np.random.Generator, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Each of (num_digits, 8, 8) turned, slanted, stretched and shifted a little, bilinearly."""
    count = len(pixels)
    matrix = np.eye(2) + rng.uniform(-0.12, 0.12, (count, 2, 2))
    shift = rng.uniform(-0.5, 0.5, (count, 2, 1))
    centre = (CELL - 1) / 2
    grid = np.indices((CELL, CELL)).reshape(2, -1) - centre
    # Where each new pixel comes from; one pixel of margin holds what lies outside.
    y, x = (matrix @ grid + shift + centre + 1).clip(0, CELL + 1).transpose(1, 0, 2)
    top, left = (np.minimum(z.astype(np.int64), CELL) for z in (y, x))
    down, right = y - top, x - left
    padded = np.pad(pixels, ((0, 0), (1, 1), (1, 1)))
    n = np.arange(count)[:, None]
    values: NDArray[np.float64] = (
        (1 - down) * (1 - right) * padded[n, top, left]
        + (1 - down) * right * padded[n, top, left + 1]
        + down * (1 - right) * padded[n, top + 1, left]
        + down * right * padded[n, top + 1, left + 1]
    )
    return values.round().astype(np.uint8).reshape(pixels.shape)


def training_batch(seed: int, step: int, scans: Scans, size: int, most: int) -> list[Example]:
    """The `size` examples of one step, 1..`most` digits each: a function of its arguments."""
    rng = np.random.default_rng([seed, step])
    kinds = rng.choice(list(TRAINING_SHARE), size, p=list(TRAINING_SHARE.values())).tolist()
    counts = rng.integers(1, most + 1, size)
    chosen = rng.integers(len(scans), size=counts.sum())
    pixels, labels = distort(rng, scans.pixels[chosen]), scans.labels[chosen]
    examples = []
    for kind, end, count in zip(kinds, counts.cumsum(), counts, strict=True):
        mine = slice(end - count, end)
        canvas = compose(rng, pixels[mine], labels[mine].tolist())
        phrasing = QUESTIONS[kind][rng.integers(len(QUESTIONS[kind]))]
        examples.append(Example(canvas, kind, phrasing, answer(kind, canvas.digits)))
    return examples


def _deal(rng: np.random.Generator, num_scans: int) -> Iterator[int]:
    """Every scan once in random order, then again: so a long deal leaves none out."""
    while True:
        yield from rng.permutation(num_scans).tolist()


def questions(scans: Scans, num_canvases: int, seed: int = 1) -> list[Example]:
    """Every kind of question about each of `num_canvases` canvases of 1..6 digits.

    The scans are dealt like cards: 150 canvases of the held-out scans show every one of them.
    """
    rng = np.random.default_rng([seed, len(scans)])
    deck = _deal(rng, len(scans))
    examples = []
    for _ in range(num_canvases):
        chosen = [next(deck) for _ in range(rng.integers(1, MAX_DIGITS + 1))]
        canvas = compose(rng, scans.pixels[chosen], scans.labels[chosen].tolist())
        for kind, phrasings in QUESTIONS.items():
            examples.append(Example(canvas, kind, phrasings[0], answer(kind, canvas.digits)))
    return examples
