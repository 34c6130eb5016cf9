"""A handful of pictures with captions and conversations, and stages that run on them."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vlmkernels.recipes import ranks
from vlmkernels.recipes.stages import StageRun

WHOLE = ("clip 1", "blip2 1")  # batches, which are not cut
OF_CAPTIONS = ("llava 1", "qwen_vl 1", "clip 1", "blip2 1", "blip2 2-opt opt", "blip2 2-t5 t5")
CAPTIONS = ("a cat", "a dog", "the cat and a dog", "two images")
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (20, 40, 230), "grey": (128,) * 3}


def write_data(folder: Path, captions: tuple[str, ...], text_only: int = 0) -> tuple[Path, Path]:
    """-> the JSON file, the folder of images: one picture a caption, then turns without any."""
    images = folder / "images"
    images.mkdir(parents=True)
    records: list[dict[str, Any]] = []
    for i, (caption, colour) in enumerate(zip(captions, COLOURS.values(), strict=False)):
        Image.new("RGB", (40 + 4 * i, 36), colour).save(images / f"{i}.png")
        records.append(
            {
                "id": str(i),
                "image": f"{i}.png",
                "conversations": [
                    {"from": "human", "value": "What is in the picture?\n<image>"},
                    {"from": "gpt", "value": caption},
                ],
            }
        )
    for _ in range(text_only):
        turns = [{"from": "human", "value": "a dog?"}, {"from": "gpt", "value": "the cat."}]
        records.append({"conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json", images


TINY = {"steps": 4, "batch": 4, "micro_batch": 1, "bf16": False, "lr": 3e-3, "warmup": 2}


def checkpoint(place: Path, which: str) -> Path:
    """Of the recipe's name, unless the third word of `which` is another."""
    recipe, _, *name = which.split()
    return place / (name or [recipe])[0]


def start(place: Path, which: str, out: Path, resume: bool = False, **changes: object) -> StageRun:
    """Of a recipe the stage, "llava 1" or "blip2 2-opt opt", with what `place` has for it."""
    recipe, stage = which.split()[:2]
    stages = import_module(f"vlmkernels.recipes.{recipe}").STAGES
    config = out.with_name(f"{out.name}.{ranks.rank()}.toml")
    whole_share = {"micro_batch": 4 // ranks.world_size()} if which in WHOLE else {}
    fields = (TINY | whole_share | changes).items()
    config.parent.mkdir(exist_ok=True)
    config.write_text("\n".join(f"{name} = {json.dumps(value)}" for name, value in fields))
    data = place / ("captions" if which in OF_CAPTIONS else "chats")
    files = (checkpoint(place, which), data / "data.json", data / "images", out)
    return StageRun.start(stages[stage], *files, config=config, resume=resume)


def command(place: Path, out: Path, settings: str, **options: object) -> list[str]:
    """`vlmkernels train llava` on captions, with settings in TOML."""
    config = out.with_suffix(".toml")
    config.write_text(settings)
    files = {"model": place / "llava", "data": place / "captions" / "data.json"}
    files |= {"images": place / "captions" / "images", "config": config, "out": out}
    given = {"stage": 1, "workers": 0, **files, **options}
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in given.items()]
    return ["train", "llava", *(word for pair in pairs for word in pair)]


def advance(run: StageRun, steps: int) -> list[dict[str, float]]:
    metrics = [run.trainer.advance() for _ in range(steps)]
    for line in metrics:
        del line["seconds"]
    return metrics


def without_dropout(run: StageRun) -> StageRun:
    """Which is drawn for a micro-batch on a rank."""
    for module in run.trainer.model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.0
    return run


def weights(run: StageRun) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in run.trainer.model.state_dict().items()}
