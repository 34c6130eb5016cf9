"""What a run must not go on from, and what must never be saved."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from .common import advance, start


def copy_of(place: Path, folder: Path) -> Path:
    """Of LLaVA and the captions, to be changed."""
    for name in ("llava", "captions"):
        shutil.copytree(place / name, folder / name)
    return folder


def test_other_data_is_refused(place: Path, tmp_path: Path) -> None:
    mine = copy_of(place, tmp_path / "mine")
    start(mine, "llava 1", tmp_path / "out").trainer.save()
    start(place, "llava 1", tmp_path / "out", resume=True)  # the same, from another folder
    file = mine / "captions" / "data.json"
    file.write_text(json.dumps(json.loads(file.read_text())[::-1]))
    with pytest.raises(ValueError, match=r"resume: expected the run's data \d+, got \d+$"):
        start(mine, "llava 1", tmp_path / "out", resume=True)


def test_another_model_is_refused(place: Path, tmp_path: Path) -> None:
    mine = copy_of(place, tmp_path / "mine")
    start(mine, "llava 1", tmp_path / "out").trainer.save()
    (file,) = (mine / "llava").glob("*.safetensors")
    weights = load_file(file)
    frozen = next(name for name in weights if "projector" not in name and weights[name].ndim > 1)
    weights[frozen][0, 0] += 1.0
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"resume: expected the run's model \d+, got \d+$"):
        start(mine, "llava 1", tmp_path / "out", resume=True)


def test_another_stage_is_refused(place: Path, tmp_path: Path) -> None:
    start(place, "qwen_vl 2", tmp_path / "out").trainer.save()
    with pytest.raises(ValueError, match=r"resume: expected the run's .*stage 'all parameters"):
        start(place, "qwen_vl 3", tmp_path / "out", resume=True)


def test_a_gradient_that_is_no_number_changes_no_weight(place: Path, tmp_path: Path) -> None:
    run = start(place, "llava 1", tmp_path / "out")
    advance(run, 1)
    weight = next(iter(run.trainer.trained.values()))
    weight.register_hook(lambda grad: grad * torch.inf)
    before = weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"step 1: the gradient's norm became (inf|nan)"):
        run.trainer.advance()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("which", ["clip 1", "blip2 1"])
def test_no_pair_is_its_own_negative(which: str, place: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"batch: expected at most the 4 examples, .* got 8"):
        start(place, which, tmp_path / "out", batch=8, micro_batch=8)
