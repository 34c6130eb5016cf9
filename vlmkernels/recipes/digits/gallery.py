"""A picture to look at: canvases with the model's answers, wrong ones in red beside the truth."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from .data import CELL, MAX_CELLS, QUESTIONS, Example

COLUMNS = 4
ZOOM = 6  # screen pixels per canvas pixel
MARGIN, LINE, FONT_SIZE = 16, 24, 17
PAPER, FRAME = "#ffffff", "#d0d4da"
INK, RIGHT, WRONG = "#5a6270", "#14713a", "#c02020"


def gallery(examples: Sequence[Example], answers: Sequence[str]) -> Image.Image:
    """One panel per canvas, with its answers below; examples come canvas by canvas."""
    panels = [
        list(zip(examples, answers, strict=True))[i : i + len(QUESTIONS)]
        for i in range(0, len(examples), len(QUESTIONS))
    ]
    rows = [panels[i : i + COLUMNS] for i in range(0, len(panels), COLUMNS)]
    width = MAX_CELLS[1] * CELL * ZOOM + MARGIN
    heights = [_picture_height(row) + LINE * len(QUESTIONS) + 2 * MARGIN for row in rows]
    sheet = Image.new("RGB", (COLUMNS * width + MARGIN, sum(heights) + MARGIN), PAPER)
    top = MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, panel in enumerate(row):
            _draw_panel(sheet, panel, MARGIN + column * width, top, _picture_height(row))
        top += height
    return sheet


def _picture_height(row: Sequence[Sequence[tuple[Example, str]]]) -> int:
    return ZOOM * max(len(panel[0][0].canvas.pixels) for panel in row)


def _draw_panel(
    sheet: Image.Image, panel: Sequence[tuple[Example, str]], left: int, top: int, space: int
) -> None:
    draw = ImageDraw.Draw(sheet)
    picture = Image.fromarray(panel[0][0].canvas.pixels)
    size = picture.width * ZOOM, picture.height * ZOOM
    picture = picture.resize(size, Image.Resampling.NEAREST)
    bottom = top + space
    sheet.paste(picture.convert("RGB"), (left, bottom - picture.height))
    frame = (left - 1, bottom - picture.height - 1, left + picture.width, bottom)
    draw.rectangle(frame, outline=FRAME)
    font = ImageFont.load_default(FONT_SIZE)
    for i, (example, given) in enumerate(panel):
        at = (left, bottom + 6 + LINE * i)
        draw.text(at, f"{example.kind}: ", INK, font)
        x = left + draw.textlength(f"{example.kind}: ", font)
        if given == example.answer:
            draw.text((x, at[1]), given, RIGHT, font)
        else:
            draw.text((x, at[1]), f"{given or '(nothing)'}  (truth: {example.answer})", WRONG, font)
