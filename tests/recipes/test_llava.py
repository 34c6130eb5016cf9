"""LLaVA-1.5's stages on a tiny random checkpoint and a handful of pictures."""

import json
from pathlib import Path

import pytest
import torch

from tests.models.common import run_command
from vlmkernels.models import load, load_processor
from vlmkernels.models.llava import VICUNA_V1
from vlmkernels.recipes.data import read_conversations
from vlmkernels.recipes.llava import STAGES
from vlmkernels.recipes.stages import StageSettings
from vlmkernels.recipes.trainer import METRICS, STATE

from .common import CAPTIONS, TINY, advance, command, start


@pytest.mark.parametrize(("stage", "changes"), [("1", {"lr": 5e-2}), ("2", {"bf16": True})])
def test_it_learns_by_heart(
    stage: str, changes: dict[str, object], place: Path, tmp_path: Path
) -> None:
    """The projector alone can but tell the pictures apart: its captions share no words."""
    run = start(place, f"llava {stage}", tmp_path / "out", steps=30, micro_batch=2, **changes)
    losses = [line["loss"] for line in advance(run, 30)]
    assert losses[-1] < {"1": 0.7, "2": 0.2}[stage] * losses[0]
    run.finish()
    model = load(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="expected a new folder, or --resume"):
        start(place, f"llava {stage}", tmp_path / "out")
    if stage == "2":
        processor = load_processor(tmp_path / "out")
        assert processor.tokenizer.chat_template == VICUNA_V1
        row = read_conversations(place / "chats" / "data.json", place / "chats" / "images")[2]
        asked = processor.from_messages(row[:1], pad_to_square=True)
        tokens = model.generate(**asked, max_new_tokens=8)[0, asked["input_ids"].shape[1] :]
        assert processor.tokenizer.decode(tokens.tolist()).strip() == CAPTIONS[2]


def test_captions_and_their_ends_carry_the_loss(place: Path, tmp_path: Path) -> None:
    run = start(place, "llava 1", tmp_path / "out")
    rows = read_conversations(place / "captions" / "data.json", place / "captions" / "images")
    settings = StageSettings(steps=1, batch=1, lr=1.0)
    batch = STAGES["1"].collate(run.processor, rows[:3:2], settings)
    for ids, labels, caption in zip(
        batch["input_ids"], batch["labels"], (CAPTIONS[0], CAPTIONS[2]), strict=True
    ):
        expected = run.processor.tokenizer.encode(caption + "\n", add_special_tokens=False)
        words = labels[labels != -100]
        assert words[-1] == expected[-1] and len(words) >= len(expected) - 1
        assert ids[:17].tolist() == [1] + [3] * 16 and (labels[:17] == -100).all()
        assert torch.equal(ids[labels != -100], words)
    assert batch["pixel_values"].shape == (2, 3, 32, 32)


def test_a_batch_without_pictures_gets_a_blank_one(place: Path, tmp_path: Path) -> None:
    run = start(place, "llava 2", tmp_path / "out")
    rows = read_conversations(place / "chats" / "data.json", place / "chats" / "images")
    settings = StageSettings(steps=1, batch=1, lr=1.0)
    collate, model = STAGES["2"].collate, run.trainer.model
    batch = collate(run.processor, rows[3:4], settings)
    assert batch["pixel_values"].shape == (1, 3, 32, 32) and len(batch["labels"]) == 2
    assert (batch["labels"][1] == -100).all()
    plain = run.processor.for_training(rows[3:4])
    torch.testing.assert_close(model(**batch).loss, model(**plain).loss)


def test_words_are_cut_off_and_pictures_never(place: Path, tmp_path: Path) -> None:
    run = start(place, "llava 2", tmp_path / "out")
    rows = read_conversations(place / "chats" / "data.json", place / "chats" / "images")
    collate = STAGES["2"].collate
    whole = collate(run.processor, rows[:1], StageSettings(steps=1, batch=1, lr=1.0))
    length = whole["labels"].shape[1] - 2
    settings = StageSettings(steps=1, batch=1, lr=1.0, max_length=length)
    batch = collate(run.processor, rows[:1], settings)
    for name in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(batch[name], whole[name][:, :length])
    assert torch.equal(batch["pixel_values"], whole["pixel_values"])
    settings = StageSettings(steps=1, batch=1, lr=1.0, max_length=10)
    with pytest.raises(ValueError, match="max_length: expected enough for the pictures"):
        collate(run.processor, rows[:1], settings)


def test_wrong_input_is_named(place: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"lr": -1.0}, "lr: expected a positive number, got -1.0"),
        ({"batch": 0}, "batch: expected a positive integer, got 0"),
        ({"micro_batch": 3}, "batch: expected a multiple of micro_batch 3 on each of 1 ranks"),
        ({"beta2": 1.0}, "beta2: expected a number of at least 0 and below 1"),
        ({"bf16": 1}, "bf16: expected true or false, got 1"),
        ({"frozen": "("}, "frozen: expected a regular expression"),
        ({"frozen": "lm_head"}, "frozen: expected the beginning of some .* got 'lm_head'"),
        ({"frozen": "."}, "frozen: expected the beginning of some parameters' names, got '.'"),
        ({"learning_rate": 1.0}, r"expected fields out of .*, got \['learning_rate'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            start(place, "llava 1", tmp_path / "out", **changes)
    with pytest.raises(ValueError, match="resume: expected a save in"):
        start(place, "llava 1", tmp_path / "out", resume=True)
    run = start(place, "llava 1", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run.trainer.save()
    with pytest.raises(ValueError, match=r"resume: expected the run's seed 0, got 1$"):
        start(place, "llava 1", tmp_path / "out", resume=True, seed=1)
    assert run.trainer.settings.learning_rate(1) == TINY["lr"]


def test_the_command_resumes_and_writes_a_checkpoint(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = command(place, tmp_path / "out", "steps = 4\nbatch = 4\nlr = 1e-3\n", save_every=2)
    code, shown, err = run_command(args, monkeypatch, capsys)
    assert (code, err) == (0, "")
    assert "the projector learns" in shown and "step     4  loss" in shown
    lines = [json.loads(line) for line in (tmp_path / "out" / METRICS).read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["loss"] > 0 and lines[-1]["grad_norm"] > 0 and lines[-1]["items"] > 4
    assert not (tmp_path / "out" / STATE).exists()
    assert load_processor(tmp_path / "out").image.crop_size == (32, 32)
    code, _, err = run_command([*args, "--resume"], monkeypatch, capsys)
    assert code == 2 and "resume: expected a save" in err
    code, _, err = run_command([*args, "--stage", "3"], monkeypatch, capsys)
    assert code == 2 and "stage: expected one of ['1', '2'], got '3'" in err
