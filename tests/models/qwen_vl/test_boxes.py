"""Regions of answers: read, written, drawn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlmkernels.models.qwen_vl import Region, draw, parse
from vlmkernels.models.qwen_vl.boxes import COLOURS


def test_regions_of_an_answer() -> None:
    answer = (
        "Here <ref> a dog </ref><box>(1,2),(300,999)</box><box>( 5, 6 ),(7,8)</box> and\n"
        "<box>(10,20),(30,40)</box>, <ref>图 中</ref><quad>(1,1),(9,1),(9,9),(1,9)</quad>."
    )
    assert parse(answer) == [
        Region(((1, 2), (300, 999)), "a dog"),
        Region(((5, 6), (7, 8)), "a dog"),
        Region(((10, 20), (30, 40))),
        Region(((1, 1), (9, 1), (9, 9), (1, 9)), "图 中"),
    ]


@pytest.mark.parametrize(
    "answer",
    [
        *("", "<ref>a</ref>", "<box></box>", "<box>(1,2)</box>", "<box>(1,2),(3,4)"),
        *("<box>(1,2),(3,4),(5,6)</box>", "<box>(1,x),(3,4)</box>", "(1,2),(3,4)"),
        *(
            f"<box>(1,2),(3,{'9' * 5000})</box>",
            "<box>(1,2),(3,1001)</box>",
            "<box>(1,2),(3,٤)</box>",
        ),
        *("<box>(1,2),(3,-4)</box>", "<quad>(1,2),(3,4)</quad>", "<box>(1,2),(3,4)</quad>"),
    ],
)
def test_what_is_no_region_is_passed_over(answer: str) -> None:
    assert parse(answer) == []
    assert parse(f"{answer} <box>(1,2),(3,4)</box>")[-1] == Region(((1, 2), (3, 4)))
    white = Image.new("RGB", (40, 40), "white")
    assert draw(white, answer).tobytes() == white.tobytes()


def test_a_name_that_is_not_closed_names_nothing() -> None:
    box = Region(((1, 2), (3, 4)))
    assert parse(f"<ref>a {box} <ref>a cat</ref>{box}") == [box, Region(box.points, "a cat")]


def test_as_written_in_a_prompt() -> None:
    region = Region.from_pixels([(32, 0), (320, 239.9)], width=320, height=240, ref="a cat")
    assert str(region) == "<ref>a cat</ref><box>(100,0),(999,999)</box>"
    assert parse(str(region)) == [region]
    assert region.to_pixels(320, 240) == ((32, 0), (319, 239))
    corners = [(0, 0), (10, 0), (10, 20), (-3, 20)]
    quad = Region.from_pixels(corners, 20, 40)
    assert str(quad) == "<quad>(0,0),(500,0),(500,500),(0,500)</quad>"
    assert parse(str(quad)) == [quad]
    with pytest.raises(ValueError, match="points: expected 2 or 4, got 3"):
        Region(((1, 2), (3, 4), (5, 6)))


@pytest.mark.parametrize("length", [0, -3, float("nan"), float("inf")])
def test_a_picture_without_a_size_is_named(length: Any) -> None:
    with pytest.raises(ValueError, match=f"width: expected a positive number, got {length}"):
        Region.from_pixels([(0, 0), (1, 1)], length, 20)
    with pytest.raises(ValueError, match=f"height: expected a positive number, got {length}"):
        Region.from_pixels([(0, 0), (1, 1)], 20, length)
    with pytest.raises(ValueError, match="points: expected numbers, got nan"):
        Region.from_pixels([(0, 0), (1, float("nan"))], 20, 20)


def test_boxes_are_drawn_where_they_are() -> None:
    image = np.full((100, 200, 3), 255, np.uint8)
    drawn = np.asarray(draw(image, "<box>(100,200),(500,800)</box>", width=1))
    assert drawn.shape == image.shape and (image == 255).all()
    left, top, right, bottom = 20, 20, 100, 80
    colour = tuple(bytes.fromhex(COLOURS[0][1:]))
    expected = image.copy()
    expected[[top, bottom], left : right + 1] = colour
    expected[top : bottom + 1, [left, right]] = colour
    assert (drawn == expected).all()


def test_names_have_colours_and_labels() -> None:
    image = Image.new("RGB", (300, 300), "white")
    text = "<ref>dog</ref><box>(100,100),(300,300)</box><box>(100,600),(300,900)</box>"
    text += "<ref>cat</ref><quad>(500,500),(900,500),(900,900),(500,900)</quad>"
    drawn = np.asarray(draw(image, text))
    dog, cat = (np.array([*bytes.fromhex(c[1:])]) for c in COLOURS[:2])
    assert (drawn[200, 30] == dog).all() and (drawn[60, 30] == dog).all()
    assert (drawn[200, 270] == cat).all()
    black = (drawn == 0).all(axis=-1)
    assert black[30:60, 30:90].any() and black[150:180, 150:210].any()
    assert not black[180:270, 30:90].any()  # a name is written once
    assert (np.asarray(draw(image, [])) == 255).all()
