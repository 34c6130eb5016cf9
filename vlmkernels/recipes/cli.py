"""`vlmkernels train`; heavy imports inside: --help is quick."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from .digits.cli import train_digits
from .progress import fit

# Each is a module here with STAGES.
RECIPES = {
    "llava": "Train LLaVA-1.5: stage 1 the projector, stage 2 also the language model.",
    "qwen2-vl": "Train Qwen2-VL, Qwen2.5-VL: stage 1 the vision tower, 2 all, 3 all but the tower.",
    "qwen-vl": "Train Qwen-VL: stage 1 the tower, 2 all, 3 the chat model, with a frozen tower.",
    "clip": "Train CLIP: its one stage, images against captions.",
    "blip2": "Train BLIP-2: stage 1 the Q-Former, 2-opt and 2-t5 through a language model.",
}

train_app = typer.Typer(help="Train a model.", no_args_is_help=True)
train_app.command("digits")(train_digits)


def train_stage(
    context: typer.Context,
    stage: Annotated[str, typer.Option(help="Which one; docs/training.md tells what they do.")],
    model: Annotated[Path, typer.Option(help="Checkpoint directory to start from.")],
    data: Annotated[Path, typer.Option(help="Conversations in LLaVA's JSON.")],
    images: Annotated[Path, typer.Option(help="Folder of the images named there.")],
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint that is made.")],
    config: Annotated[
        Path | None, typer.Option(help="TOML file with other settings than the published.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on where a killed run saved last.")] = False,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between saves.")] = 500,
    report_every: Annotated[int, typer.Option(min=1, help="Steps between lines shown.")] = 10,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images.")] = 4,
) -> None:
    from rich.console import Console

    from . import ranks
    from .stages import StageRun

    stages = import_module(f"{__package__}.{str(context.info_name).replace('-', '_')}").STAGES
    if stage not in stages:
        raise ValueError(f"stage: expected one of {[*stages]}, got {stage!r}")
    with ranks.joined():
        console = Console(quiet=ranks.rank() > 0)
        run = StageRun.start(
            *(stages[stage], model, data, images, out),
            config=config, workers=workers, resume=resume,
        )  # fmt: skip
        moved = sum(p.numel() for p in run.trainer.trained.values())
        console.print(
            f"{stages[stage].does}: {moved:,} weights, {run.trainer.settings}", markup=False
        )
        fit(run.trainer, console, save_every=save_every, report_every=report_every)
        run.finish()
        console.print(f"wrote {out}", markup=False)


@train_app.command("llava-init")
def llava_init(
    vision: Annotated[Path, typer.Option(help="Checkpoint directory of a CLIP.")],
    language: Annotated[Path, typer.Option(help="Checkpoint directory of a LLaMA.")],
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint that is made.")],
    seed: Annotated[int, typer.Option(help="Of the projector.")] = 0,
) -> None:
    """Join a CLIP and a LLaMA by a new projector: what LLaVA-1.5's stage 1 starts from."""
    from .llava.initial import assemble

    assemble(vision, language, out, seed)


for _name, _help in RECIPES.items():
    train_app.command(_name, help=_help)(train_stage)
