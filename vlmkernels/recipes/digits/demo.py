"""The demo: the shipped model reads digits that it never saw in training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from vlmkernels.models import load, load_processor
from vlmkernels.models.qwen2_vl import Qwen2VL, Qwen2VLProcessor
from vlmkernels.testing import reference_ops
from vlmkernels.testing.timer import Timing, time_interleaved

from . import CHECKPOINT
from .data import QUESTIONS, Example, load_scans, questions
from .evaluate import answer_all, generate, prompt
from .gallery import gallery
from .photo import normalise

TIMED_IMAGES = 16
GALLERY_CANVASES = 24


@dataclass(frozen=True)
class Reader:
    """A model that reads digits, with its processor."""

    model: Qwen2VL
    processor: Qwen2VLProcessor

    @classmethod
    def load(cls, path: str | Path = CHECKPOINT) -> Reader:
        """On the GPU in bfloat16 when there is one, else on the CPU in float32."""
        if torch.cuda.is_available():
            model = load(path, dtype=torch.bfloat16, device="cuda")
        else:
            model = load(path, dtype=torch.float32)
        return cls(model, load_processor(path))

    def answer(self, examples: list[Example]) -> list[str]:
        pictures = [Image.fromarray(e.canvas.pixels) for e in examples]
        asked = [e.question for e in examples]
        return list(answer_all(self.model, self.processor, pictures, asked))


def held_out_questions(num_canvases: int) -> list[Example]:
    """Three questions about each canvas of held-out digits."""
    _, held_out = load_scans()
    return questions(held_out, num_canvases)


def save_gallery(examples: list[Example], answers: list[str], out: Path) -> Path:
    """Writes the first canvases and their answers to `out`/gallery.png."""
    out.mkdir(parents=True, exist_ok=True)
    count = GALLERY_CANVASES * len(QUESTIONS)
    path = out / "gallery.png"
    gallery(examples[:count], answers[:count]).save(path)
    return path


def time_per_image(reader: Reader, examples: list[Example]) -> tuple[int, Mapping[str, Timing]]:
    """Images in a batch, and seconds for it to be read, pixels to tokens: our ops and plain
    PyTorch, taking turns."""
    asked = [e for e in examples if e.kind == "read"][:TIMED_IMAGES]
    texts = [prompt(reader.processor, e.question) for e in asked]
    inputs = reader.processor(texts, [e.canvas.pixels for e in asked])

    def reference() -> None:
        with reference_ops():
            generate(reader.model, inputs)

    variants = {"ours": lambda: generate(reader.model, inputs), "eager": reference}
    return len(asked), time_interleaved(variants, rounds=7, end_to_end=True)


def ask_about(reader: Reader, image: str | Path, asked: list[str], out: Path) -> list[str]:
    """Answers about the user's own picture; writes what the model saw to `out`/seen.png.

    Raises ValueError with one line when it is no picture of digits (photo.py).
    """
    canvas = Image.fromarray(normalise(image))
    out.mkdir(parents=True, exist_ok=True)
    canvas.resize((canvas.width * 16, canvas.height * 16), Image.Resampling.NEAREST).save(
        out / "seen.png"
    )
    return list(answer_all(reader.model, reader.processor, [canvas] * len(asked), asked))
