"""BLIP-2's own: what carries loss, and where captions are cut."""

from pathlib import Path

import pytest
import torch

from vlmkernels.models import load_processor
from vlmkernels.recipes.blip2 import STAGES
from vlmkernels.recipes.data import read_conversations
from vlmkernels.recipes.stages import StageRun, StageSettings
from vlmkernels.recipes.trainer import Batch

from .common import CAPTIONS


def collated(place: Path, kind: str, **settings: int) -> Batch:
    rows = read_conversations(place / "captions" / "data.json", place / "captions" / "images")
    collate, fields = STAGES[f"2-{kind}"].collate, {"steps": 1, "batch": 1, "lr": 1.0, **settings}
    return collate(load_processor(place / kind), rows, StageSettings(**fields))


def known(place: Path, kind: str, text: str | torch.Tensor) -> str:
    """What the tiny tokenizer has letters for, of a text or of ids."""
    tokenizer = load_processor(place / kind).tokenizer
    ids = tokenizer.encode(text) if isinstance(text, str) else text[text >= 0].tolist()
    return str(tokenizer.decode(ids))


def test_opt_learns_everything_behind_the_queries(place: Path) -> None:
    batch = collated(place, "opt")
    assert (batch["input_ids"][:, :4] == 4).all() and (batch["labels"][:, :4] == -100).all()
    for ids, labels, mask, caption in zip(
        batch["input_ids"], batch["labels"], batch["attention_mask"], CAPTIONS, strict=True
    ):
        assert torch.equal(labels[4:], ids[4:].masked_fill(mask[4:] == 0, -100))
        assert labels[4] == 2 and known(place, "opt", labels[5:]) == known(place, "opt", caption)
    assert (collated(place, "opt", max_length=3)["labels"] != -100).sum(dim=1).tolist() == [3] * 4


def test_t5_reads_the_first_words_and_learns_the_rest(place: Path) -> None:
    places = set()
    for seed in range(4):
        batch = collated(place, "t5", seed=seed)
        assert torch.equal(batch["labels"], collated(place, "t5", seed=seed)["labels"])
        for ids, labels, mask, caption in zip(
            batch["input_ids"], batch["labels"], batch["attention_mask"], CAPTIONS, strict=True
        ):
            assert (ids[:4] == 3).all()
            assert (labels == 1).sum() == 1 and labels[labels >= 0][-1] == 1  # </s>
            first = known(place, "t5", ids[4:][mask[4:] == 1])
            rest = known(place, "t5", labels)
            assert rest and f"{first} {rest}".strip() == known(place, "t5", caption)
            places.add(len(first))
    assert len(places) > 2


def test_the_language_model_must_be_the_stage_s(place: Path, tmp_path: Path) -> None:
    data = place / "captions"
    with pytest.raises(ValueError, match="model: expected Blip2OPT, got Blip2T5"):
        StageRun.start(
            *(STAGES["2-opt"], place / "t5", data / "data.json", data / "images", tmp_path / "out")
        )


def test_a_caption_has_a_picture(place: Path, tmp_path: Path) -> None:
    data = place / "chats"
    with pytest.raises(ValueError, match="data: expected one image for each caption, got 0"):
        StageRun.start(
            *(STAGES["2-opt"], place / "opt", data / "data.json", data / "images", tmp_path / "out")
        )
