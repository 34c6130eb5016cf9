"""`vlmkernels train digits` and `vlmkernels demo`; heavy imports inside: --help is quick."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmkernels.recipes.progress import fit

if TYPE_CHECKING:
    from rich.console import Console

    from .data import Example
    from .demo import Reader

REPORT_EVERY = 100  # steps
SAVE_EVERY = 200
CANVASES = 200  # held-out, with three questions each
SHOWN = 6  # questions printed by the demo


def train_digits(
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint.")] = Path("digits_model"),
    resume: Annotated[bool, typer.Option(help="Go on where a killed run saved last.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Length of the run.")] = 3000,
    seed: Annotated[int, typer.Option(help="Of weights and data.")] = 0,
) -> None:
    """Train the digits model on the CPU and measure it on held-out digits."""
    from rich.console import Console

    from .train import DigitsSettings, Run

    console = Console()
    run = Run(out, DigitsSettings(steps=steps, seed=seed), resume=resume)
    fit(run, console, save_every=SAVE_EVERY, report_every=REPORT_EVERY)
    run.export()
    console.print(f"wrote {out}", markup=False)
    from .demo import Reader, held_out_questions

    _answers(Reader.load(out), held_out_questions(CANVASES), console)


def demo(
    image: Annotated[Path | None, typer.Option(help="Your own picture of digits.")] = None,
    question: Annotated[str | None, typer.Option(help="What to ask about --image.")] = None,
    out: Annotated[Path, typer.Option(help="Where pictures are saved.")] = Path("demo_output"),
    model: Annotated[Path | None, typer.Option(help="Another checkpoint to show.")] = None,
    canvases: Annotated[int, typer.Option(min=8, help="Held-out canvases to ask about.")] = 200,
) -> None:
    """Show the shipped model reading digits that it never saw, or your own picture of digits."""
    from rich.console import Console

    from . import CHECKPOINT
    from .demo import Reader

    console = Console()
    if question is not None and image is None:
        raise ValueError("question: expected together with --image")
    if image is not None:
        _own_image(image, question, model or CHECKPOINT, out, console)
        return
    _show(Reader.load(model or CHECKPOINT), canvases, out, console)


def _own_image(image: Path, question: str | None, model: Path, out: Path, console: Console) -> None:
    from .data import QUESTIONS
    from .demo import Reader, ask_about

    asked = [question] if question else [phrasings[0] for phrasings in QUESTIONS.values()]
    answers = ask_about(Reader.load(model), image, asked, out)
    for q, a in zip(asked, answers, strict=True):
        console.print(f"{q}  {a}", markup=False)
    console.print(f"what the model saw: {out / 'seen.png'}", markup=False)


def _show(reader: Reader, canvases: int, out: Path, console: Console) -> None:
    from .demo import held_out_questions, save_gallery, time_per_image

    count = sum(p.numel() for p in reader.model.parameters())
    console.print(f"Qwen2-VL, {count:,} parameters, {reader.model.dtype} on {reader.model.device}")
    _backends(console)
    examples = held_out_questions(canvases)
    answers = _answers(reader, examples, console)
    console.print(f"gallery: {save_gallery(examples, answers, out)}", markup=False)
    count, times = time_per_image(reader, examples)
    ours, eager = (times[name].median / count * 1e3 for name in ("ours", "eager"))
    console.print(
        f"time per image, pixels to answer, batches of {count}: {ours:.2f} ms with our ops, "
        f"{eager:.2f} ms with their plain PyTorch references, {eager / ours:.2f}x"
    )


def _answers(reader: Reader, examples: list[Example], console: Console) -> list[str]:
    """Asks everything, prints a few answers and the score."""
    from rich.table import Table
    from rich.text import Text

    from .evaluate import accuracy

    with console.status(f"asking {len(examples)} questions about held-out digits"):
        answers = reader.answer(examples)
    table = Table("question", "answer", "truth")
    # Every fourth: another canvas and another kind of question each time.
    for example, given in list(zip(examples, answers, strict=True))[: 4 * SHOWN : 4]:
        style = "green" if given == example.answer else "red"
        table.add_row(example.question, Text(given, style), example.answer)
    console.print(table)
    for kind, (right, total) in accuracy(examples, answers).items():
        console.print(f"{kind:8} {right:4d} of {total:4d} whole answers exact  {right / total:.1%}")
    return answers


def _backends(console: Console) -> None:
    from rich.table import Table

    from vlmkernels.info import backends

    table = Table("op", "backend", "why")
    for op, (backend, why) in backends().items():
        table.add_row(op, backend, why)
    console.print(table)
