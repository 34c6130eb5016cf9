"""A run on the terminal: a bar, and the mean loss now and then."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from .trainer import Metrics, Trainer


def fit(trainer: Trainer, console: Console, *, save_every: int, report_every: int) -> None:
    """`trainer.fit`, shown."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    steps = trainer.settings.steps
    if trainer.step:
        console.print(f"resumed at step {trainer.step}")
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=console) as progress:
        task = progress.add_task("training", total=steps, completed=trainer.step)
        losses: list[float] = []

        def report(metrics: Metrics) -> None:
            losses.append(metrics["loss"])
            if trainer.step % report_every == 0 or trainer.step == steps:
                mean = sum(losses) / len(losses)
                console.print(f"step {trainer.step:5d}  loss {mean:.4f}")
                losses.clear()
            progress.update(task, completed=trainer.step)

        trainer.fit(save_every, report)
