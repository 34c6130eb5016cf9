"""What holds for every stage of every recipe."""

import re
from pathlib import Path

import pytest

from vlmkernels.models import load

from .common import WHOLE, advance, checkpoint, start, weights, without_dropout

# What moves in each stage.
STAGES = {
    "blip2 1": r"(?!vision_model\.)",
    "blip2 2-opt opt": r"query_tokens|qformer\.|language_projection\.",
    "blip2 2-t5 t5": r"query_tokens|qformer\.|language_projection\.",
    "clip 1": r"",
    "llava 1": r"multi_modal_projector\.",
    "llava 2": r"multi_modal_projector\.|language_model\.",
    "qwen_vl 1": r"visual\.",
    "qwen_vl 2": r"",
    "qwen_vl 3": r"visual\.attn_pool\.|transformer\.|lm_head\.",
    "qwen2_vl 1": r"visual\.",
    "qwen2_vl 2": r"",
    "qwen2_vl 3 qwen2_5_vl": r"visual\.merger\.|model\.|lm_head\.",
    "qwen2_vl 3": r"visual\.merger\.|model\.|lm_head\.",
}
KEY_BIASES = ("k_proj.bias", "key.bias")
every_stage = pytest.mark.parametrize("which", STAGES)


@every_stage
def test_only_what_the_stage_trains_moves(which: str, place: Path, tmp_path: Path) -> None:
    run = start(place, which, tmp_path / "out")
    before = weights(run)
    stored = load(checkpoint(place, which)).state_dict()
    assert all(before[name].equal(weight) for name, weight in stored.items())
    advance(run, 2)
    moved = {name for name, weight in weights(run).items() if not weight.equal(before[name])}
    constant = {"visual.attn_pool.pos_embed"}  # sines
    expected = {name for name in before if re.match(STAGES[which], name)} - constant
    assert moved <= expected
    # A key bias shifts all scores of a query alike: its gradient may be nothing at all.
    assert {name for name in expected - moved if not name.endswith(KEY_BIASES)} == set()


@pytest.mark.parametrize("which", [which for which in STAGES if which not in WHOLE])
def test_micro_batches_make_the_same_step(which: str, place: Path, tmp_path: Path) -> None:
    whole = start(place, which, tmp_path / "whole", micro_batch=4)
    expected = advance(without_dropout(whole), 3)
    found = advance(without_dropout(start(place, which, tmp_path / "parts")), 3)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@every_stage
def test_a_killed_run_resumes_to_the_same_bits(which: str, place: Path, tmp_path: Path) -> None:
    whole = start(place, which, tmp_path / "whole")
    expected = advance(whole, 4)
    killed = start(place, which, tmp_path / "killed")
    advance(killed, 1)
    killed.trainer.save()
    advance(killed, 1)
    killed.trainer.save()
    advance(killed, 1)  # lost
    resumed = start(place, which, tmp_path / "killed", resume=True)
    assert resumed.trainer.step == 2
    assert advance(resumed, 2) == expected[2:]
    after = weights(whole)
    assert [n for n, w in weights(resumed).items() if not w.equal(after[n])] == []


@every_stage
def test_in_bfloat16_with_recomputed_layers_it_learns(
    which: str, place: Path, tmp_path: Path
) -> None:
    changes = {"bf16": True, "gradient_checkpointing": True, "micro_batch": 4, "lr": 1e-2}
    run = start(place, which, tmp_path / "out", steps=20, **changes)
    losses = [line["loss"] for line in advance(run, 20)]
    assert losses[-1] < 0.9 * losses[0]
    run.finish()
    trained = dict(run.trainer.trained)
    for name, weight in load(tmp_path / "out").state_dict().items():
        given = run.trainer.model.state_dict()[name]
        assert weight.equal(given.bfloat16()), name
    assert trained
