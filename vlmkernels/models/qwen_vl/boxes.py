"""<ref>, <box>, <quad>: places in a picture, out of an answer, into a prompt, onto the picture."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from vlmkernels.models.images import load_rgb

SCALE = 1000  # places are whole thousandths of the width and height, [0, 1000)
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#17becf")

_POINT = r"\s*\(\s*([0-9]{1,4})\s*,\s*([0-9]{1,4})\s*\)\s*"
_TAG = re.compile(
    r"<ref>(?P<ref>(?:(?!<(?:ref|box|quad)>).)*?)</ref>"
    rf"|<box>{_POINT},{_POINT}</box>"
    rf"|<quad>{','.join([_POINT] * 4)}</quad>",
    re.DOTALL,
)


@dataclass(frozen=True)
class Region:
    """A box (two corners, top left and bottom right) or a quadrilateral (four), and its name.

    points: (x, y) in thousandths of the picture's width and height.
    """

    points: tuple[tuple[int, int], ...]
    ref: str | None = None

    def __post_init__(self) -> None:
        if len(self.points) not in (2, 4):
            raise ValueError(f"points: expected 2 or 4, got {len(self.points)}")

    @classmethod
    def from_pixels(
        cls, points: Iterable[Sequence[float]], width: int, height: int, ref: str | None = None
    ) -> Region:
        """From pixels of a picture; a point beyond its edge counts as on it."""
        for name, length in (("width", width), ("height", height)):
            if not 0 < length < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {length}")
        return cls(tuple((_share(x, width), _share(y, height)) for x, y in points), ref)

    def to_pixels(self, width: int, height: int) -> tuple[tuple[int, int], ...]:
        """The points in pixels of a picture of this size, rounded down."""
        return tuple((x * width // SCALE, y * height // SCALE) for x, y in self.points)

    def __str__(self) -> str:
        """As it is written in a prompt."""
        tag = "box" if len(self.points) == 2 else "quad"
        name = "" if self.ref is None else f"<ref>{self.ref}</ref>"
        return f"{name}<{tag}>{','.join(f'({x},{y})' for x, y in self.points)}</{tag}>"


def parse(text: str) -> list[Region]:
    """The regions in a text, in order; those that follow a <ref> without text between have its
    name. What is not written as a box or quadrilateral, or has a coordinate outside of [0, 1000],
    is passed over: models make mistakes."""
    regions: list[Region] = []
    name, end = None, -1
    for match in _TAG.finditer(text):
        numbers = [int(x) for x in match.groups()[1:] if x is not None]
        if max(numbers, default=0) > SCALE:
            continue
        if match.start() != end:
            name = None
        end = match.end()
        if match["ref"] is not None:
            name = match["ref"].strip()
            continue
        points = tuple(zip(numbers[::2], numbers[1::2], strict=True))
        regions.append(Region(points, name))
    return regions


def draw(
    image: Any,
    regions: str | Sequence[Region],
    *,
    width: int | None = None,
    font: Any = None,
) -> Image.Image:
    """A copy of the picture with the regions of an answer, each name in a colour of its own.

    Args:
        image: as of `vlmkernels.models.images.load_rgb`.
        regions: or the text that holds them.
        width: of the lines, in pixels; by default a 200th of the picture's shorter side.
        font: of PIL.ImageFont, for names that Pillow's own has no letters for.
    """
    picture = Image.fromarray(load_rgb(image))
    canvas = ImageDraw.Draw(picture)
    short = min(picture.size)
    line = max(short // 200, 1) if width is None else width
    font = font or ImageFont.load_default(max(short // 30, 12))
    colours: dict[str | None, str] = {}
    labelled: set[str | None] = {None}
    for region in parse(regions) if isinstance(regions, str) else regions:
        colour = colours.setdefault(region.ref, COLOURS[len(colours) % len(COLOURS)])
        points = region.to_pixels(*picture.size)
        if len(points) == 2:
            (left, top), (right, bottom) = points
            corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
        else:
            corners = list(points)
        canvas.line([*corners, *corners[:2]], fill=colour, width=line, joint="curve")
        if region.ref not in labelled:
            labelled.add(region.ref)
            place = canvas.textbbox(corners[0], str(region.ref), font=font)
            canvas.rectangle(place, fill="black")
            canvas.text(corners[0], str(region.ref), fill=colour, font=font)
    return picture


def _share(x: float, length: int) -> int:
    if math.isnan(x):
        raise ValueError(f"points: expected numbers, got {x}")
    return int(min(max(x * SCALE / length, 0), SCALE - 1))
