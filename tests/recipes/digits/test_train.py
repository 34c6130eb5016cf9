"""Labels, schedule, and a killed run against one that was left alone."""

import os
from pathlib import Path

import pytest
import torch

from vlmkernels.models import load
from vlmkernels.recipes.digits.data import load_scans, training_batch
from vlmkernels.recipes.digits.train import DigitsSettings, Run, collate

TINY = DigitsSettings(steps=6, batch=4, warmup=2, single_share=0.5)


def run_to(run: Run, step: int) -> Run:
    while run.step < step:
        run.advance()
    return run


def test_a_killed_and_resumed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole = run_to(Run(tmp_path / "whole", TINY), 6)

    killed = run_to(Run(tmp_path / "killed", TINY), 3)
    killed.save()
    run_to(killed, 5)  # lost with the process
    resumed = Run(tmp_path / "killed", TINY, resume=True)
    assert resumed.step == 3
    run_to(resumed, 6)

    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


def test_training_moves_every_weight_and_is_seeded(tmp_path: Path) -> None:
    run = Run(tmp_path / "a", TINY)
    before = {name: weight.clone() for name, weight in run.model.state_dict().items()}
    run_to(run, 3)
    after = run.model.state_dict()
    assert [name for name in before if torch.equal(before[name], after[name])] == []

    other = Run(tmp_path / "b", DigitsSettings(**{**vars(TINY), "seed": 1}))
    name = "model.layers.0.mlp.gate_proj.weight"
    assert not torch.equal(before[name], other.model.state_dict()[name])


def test_a_kill_while_saving_leaves_the_last_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_to(Run(tmp_path, TINY), 1)
    run.save()
    saved = {name: weight.clone() for name, weight in run.model.state_dict().items()}
    run.advance()

    replace = os.replace

    def killed(source: Path, target: Path) -> None:
        if source.is_dir():  # all is written
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        run.save()
    monkeypatch.undo()
    resumed = Run(tmp_path, TINY, resume=True)
    assert resumed.step == 1
    for name, weight in resumed.model.state_dict().items():
        assert torch.equal(weight, saved[name]), name


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_resume_refuses_what_it_cannot_continue(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found none"):
        Run(tmp_path / "new", TINY, resume=True)
    assert not (tmp_path / "new").exists()
    run_to(Run(tmp_path, TINY), 1).save()
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="expected the run's seed"):
        Run(tmp_path, DigitsSettings(**{**vars(TINY), "seed": 1}), resume=True)
    with pytest.raises(ValueError, match="expected a new folder, or --resume"):
        Run(tmp_path, TINY)
    assert contents(tmp_path) == before


def test_export_is_a_checkpoint_in_bfloat16(tmp_path: Path) -> None:
    run = run_to(Run(tmp_path, TINY), 1)
    run.export()
    model = load(tmp_path)
    assert model.dtype == torch.bfloat16
    assert model.generation_config["max_new_tokens"] > 0
    for name, weight in run.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight.to(torch.bfloat16)), name


def test_labels_are_the_answer_and_its_end(tmp_path: Path) -> None:
    run = Run(tmp_path, TINY)
    examples = training_batch(0, 0, load_scans()[0], 16, 6)
    batch = collate(run.processor, examples)
    decode = run.processor.tokenizer.decode
    for row, ids, mask, example in zip(
        batch["labels"], batch["input_ids"], batch["attention_mask"], examples, strict=True
    ):
        labels = row[row != -100].tolist()
        assert decode(labels, skip_special_tokens=False) == example.answer + "<|im_end|>"
        text = decode(ids[mask.bool()].tolist(), skip_special_tokens=False)
        assert text.endswith(f"assistant\n{example.answer}<|im_end|>")
        assert text.count("<|image_pad|>") == example.canvas.pixels.size // 64
        assert torch.equal(row[row != -100], ids[row != -100])


def test_schedule() -> None:
    s = DigitsSettings(steps=1000, warmup=100, lr=1e-3, single_share=0.2)
    rates = [s.learning_rate(step) for step in range(1000)]
    assert rates[0] == pytest.approx(1e-5)
    assert max(rates) < 1e-3
    assert rates[99:] == sorted(rates[99:], reverse=True)
    assert rates[-1] == pytest.approx(0.02e-3, rel=0.01)
    assert [s.most_digits(step) for step in (0, 199, 200, 999)] == [1, 1, 6, 6]
