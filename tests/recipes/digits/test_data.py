"""The split, the canvases and the questions of the digits recipe."""

from itertools import islice

import numpy as np
import pytest

from vlmkernels.recipes.digits import data
from vlmkernels.recipes.digits.data import CELL, MAX_CELLS, STEP, Scans


@pytest.fixture(scope="module")
def split() -> tuple[Scans, Scans]:
    return data.load_scans()


def test_no_held_out_scan_is_in_training(split: tuple[Scans, Scans]) -> None:
    train, held_out = split
    assert (len(train), len(held_out)) == (1347, 450)
    assert sorted([*train.index, *held_out.index]) == list(range(1797))
    assert not {p.tobytes() for p in train.pixels} & {p.tobytes() for p in held_out.pixels}
    assert set(train.labels) == set(held_out.labels) == set(range(10))


def test_scans_are_scikit_learns_in_bytes(split: tuple[Scans, Scans]) -> None:
    from sklearn.datasets import load_digits

    original = load_digits()
    for side in split:
        assert np.array_equal(side.labels, original.target[side.index])
        assert np.abs(side.pixels * (16 / 255) - original.images[side.index]).max() < 0.04


def test_a_training_batch_depends_on_seed_and_step_only(split: tuple[Scans, Scans]) -> None:
    def batch(seed: int, step: int) -> list[tuple[bytes, str, str]]:
        examples = data.training_batch(seed, step, split[0], 8, 6)
        return [(e.canvas.pixels.tobytes(), e.question, e.answer) for e in examples]

    assert batch(0, 5) == batch(0, 5)
    assert batch(0, 5) != batch(0, 6)
    assert batch(0, 5) != batch(1, 5)


def test_a_training_batch_shows_the_given_scans_only(split: tuple[Scans, Scans]) -> None:
    blank = Scans(np.zeros_like(split[0].pixels), split[0].labels, split[0].index)
    for example in data.training_batch(0, 0, blank, 32, 6):
        assert np.median(example.canvas.pixels) <= 60
        assert example.canvas.pixels.max() < 100  # background and noise, no ink


@pytest.mark.parametrize("most", [1, 6])
def test_batch_covers_kinds_phrasings_and_counts(split: tuple[Scans, Scans], most: int) -> None:
    examples = data.training_batch(0, 0, split[0], 300, most)
    assert {e.question for e in examples} == {q for qs in data.QUESTIONS.values() for q in qs}
    assert {len(e.canvas.digits) for e in examples} == set(range(1, most + 1))
    assert all(e.answer == data.answer(e.kind, e.canvas.digits) for e in examples)


def test_canvases_vary_in_size_and_aspect(split: tuple[Scans, Scans]) -> None:
    shapes = {e.canvas.pixels.shape for e in data.training_batch(0, 0, split[0], 500, 6)}
    assert len(shapes) >= 25
    assert all(h % CELL == 0 and w % CELL == 0 for h, w in shapes)
    assert max(h for h, _ in shapes) == MAX_CELLS[0] * CELL
    assert max(w for _, w in shapes) == MAX_CELLS[1] * CELL
    assert min(w / h for h, w in shapes) <= 0.5
    assert max(w / h for h, w in shapes) >= 4


@pytest.mark.parametrize("seed", range(30))
def test_scans_lie_whole_on_the_grid_in_reading_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 4))
    levels = np.array([155, 205, 255][-count:])
    scans = np.broadcast_to(levels[:, None, None], (count, CELL, CELL)).astype(np.uint8)
    canvas = data.compose(rng, scans, list(range(count)))

    h, w = canvas.pixels.shape
    blocks = canvas.pixels.reshape(h // STEP, STEP, w // STEP, STEP).mean(axis=(1, 3))
    # Ground is at most 40 + noise. The levels keep their order, whatever the contrast.
    found = np.where(blocks > 70, 1 + np.digitize(blocks / blocks.max(), [0.75, 0.925]), 0)
    places = [np.argwhere(found == level) for level in range(4 - count, 4)]
    corners = [tuple(p.min(axis=0)) for p in places]
    for place, corner in zip(places, corners, strict=True):
        assert (place - corner).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert corners == sorted(corners)
    assert canvas.digits == tuple(range(count))


@pytest.mark.parametrize(("kind", "expected"), [("read", "3071"), ("count", "4"), ("largest", "7")])
def test_answers(kind: str, expected: str) -> None:
    assert data.answer(kind, (3, 0, 7, 1)) == expected


def test_unknown_kind_is_an_error() -> None:
    with pytest.raises(ValueError, match="kind: expected one of"):
        data.answer("smallest", (1,))


def test_held_out_questions_show_every_held_out_scan(split: tuple[Scans, Scans]) -> None:
    dealt = list(islice(data._deal(np.random.default_rng(0), 450), 900))
    assert sorted(dealt[:450]) == sorted(dealt[450:]) == list(range(450))
    examples = data.questions(split[1], 150)
    assert len(examples) == 450
    assert sum(len(e.canvas.digits) for e in examples if e.kind == "read") >= 450
    again = data.questions(split[1], 150)
    assert all(
        np.array_equal(a.canvas.pixels, b.canvas.pixels)
        for a, b in zip(examples, again, strict=True)
    )


def test_distortion_is_small_and_adds_no_ink(split: tuple[Scans, Scans]) -> None:
    pixels = split[0].pixels[:200]
    rng = np.random.default_rng(0)
    changed = data.distort(rng, pixels).astype(float)
    distance = np.abs(changed - pixels).mean(axis=(1, 2))
    other = np.abs(np.roll(pixels, 1, axis=0).astype(float) - pixels).mean()
    assert distance.min() > 0
    assert distance.mean() < 0.6 * other
    assert not data.distort(rng, np.zeros_like(pixels)).any()
