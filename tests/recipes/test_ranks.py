"""Two processes over Gloo, sharded by FSDP2, against one."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from vlmkernels.models import load
from vlmkernels.recipes import ranks

from .common import advance, start, without_dropout

pytestmark = pytest.mark.xdist_group("gloo")


# Of other stages than the one whose resumption is looked at.
SETTINGS: dict[str, dict[str, object]] = {
    "llava 1": {"bf16": True},
    "clip 1": {},
    "blip2 2-opt opt": {},
    "blip2 2-t5 t5": {},
    "qwen2_vl 1": {},
    "qwen_vl 3": {},
}


def three_steps(place: Path, which: str, out: Path) -> list[dict[str, float]]:
    run = without_dropout(start(place, which, out, **SETTINGS[which]))
    metrics = advance(run, 3)
    run.finish()
    return metrics


def on_two_ranks(rank: int, place: Path, out: Path) -> None:
    """A run left alone, and one that was killed and resumed."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{out}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    whole = start(place, "llava 2", out / "whole")
    metrics = advance(whole, 4)
    killed = start(place, "llava 2", out / "killed")
    advance(killed, 2)
    killed.trainer.save()
    advance(killed, 1)  # lost
    resumed = start(place, "llava 2", out / "killed", resume=True)
    assert advance(resumed, 2) == metrics[2:]
    expected = ranks.gathered(whole.trainer.model, torch.float32)
    found = ranks.gathered(resumed.trainer.model, torch.float32)
    assert len(found) == (0 if rank else len(dict(whole.trainer.model.named_parameters())))
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    others = {which: three_steps(place, which, out / which) for which in SETTINGS}
    # Wrong pairs are made on each rank from its own: only that ranks agree can be looked at.
    pairs = start(place, "blip2 1", out / "pairs")
    advance(pairs, 2)
    temperature = float(pairs.trainer.model.temp.detach())
    assert ranks.total(temperature) == 2 * temperature != 0.14
    if rank == 0:
        (out / "metrics.json").write_text(json.dumps({"llava 2": metrics, **others}))
    ranks.barrier()
    dist.destroy_process_group()


def test_two_ranks_are_one(place: Path, tmp_path: Path) -> None:
    """Each step has rows with and without pictures: ranks whose rows have none keep step."""
    mp.spawn(on_two_ranks, (place, tmp_path), nprocs=2)
    found = json.loads((tmp_path / "metrics.json").read_text())
    for which, settings in SETTINGS.items():
        alone = three_steps(place, which, tmp_path / f"{which} alone")
        for ours, theirs in zip(found[which], alone, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-2 if "bf16" in settings else 1e-4), which
        ours, theirs = (load(tmp_path / name).state_dict() for name in (which, f"{which} alone"))
        for name, weight in theirs.items():
            torch.testing.assert_close(ours[name], weight, rtol=2e-2, atol=2e-3)
    expected = advance(start(place, "llava 2", tmp_path / "alone"), 4)
    for ours, theirs in zip(found["llava 2"], expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    # What two ranks saved goes on on one.
    resumed = start(place, "llava 2", tmp_path / "killed", resume=True)
    for ours, theirs in zip(advance(resumed, 2), expected[2:], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
