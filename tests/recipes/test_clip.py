"""CLIP's own: whole batches, and a temperature with a bound."""

import math
from pathlib import Path

import pytest
import torch

from .common import start


def test_the_temperature_stays_bounded(place: Path, tmp_path: Path) -> None:
    trainer = start(place, "clip 1", tmp_path / "out").trainer
    scale = trainer.model.logit_scale
    with torch.no_grad():
        scale.fill_(6.0)  # as if it had grown: exp(6) > 400
    trainer.advance()
    assert float(scale.detach()) == pytest.approx(math.log(100.0))
    for _ in range(2):
        trainer.advance()
        assert 0.0 <= float(scale.detach()) <= math.log(100.0) + 1e-6


def test_decay_is_for_matrices_alone(place: Path, tmp_path: Path) -> None:
    trainer = start(place, "clip 1", tmp_path / "out").trainer
    for group in trainer.optimizer.param_groups:
        assert len({parameter.ndim > 1 for parameter in group["params"]}) == 1
        assert group["weight_decay"] == (0.2 if group["params"][0].ndim > 1 else 0.0)
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == len(
        trainer.trained
    )


def test_a_batch_is_not_cut(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="micro_batch: expected a rank's whole share 4"):
        start(place, "clip 1", tmp_path / "out", micro_batch=1)
