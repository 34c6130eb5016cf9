"""The planner's arithmetic against figures worked out by hand, and its command."""

import pytest
from typer.testing import CliRunner

from vlmkernels.cli import app
from vlmkernels.distributed.planner import Machine, causal_pairs, estimate

NVLINK = Machine(flops=650e12, bandwidth=450e9)


def test_lwm_at_a_million_tokens() -> None:
    """LWM 7B (32 heads of 128, no GQA) on 16 ranks: 35.2 TFLOP and 1 GiB of keys at each hop."""
    costs = estimate(causal_pairs(1 << 20), 1 << 20, 16, 32, 32, 128, machine=NVLINK)
    ring = next(cost for cost in costs if cost.way == "p2p")
    assert ring.hop_compute == pytest.approx(35.2e12 / 650e12, rel=1e-3)
    assert ring.hop_transfer == pytest.approx(2**30 / 450e9, rel=1e-3)
    assert ring.exposed == 0
    assert ring.compute == pytest.approx(3.5 * 16 * ring.hop_compute)


def test_slow_links_show() -> None:
    slow = Machine(flops=650e12, bandwidth=50e9)
    costs = estimate(causal_pairs(1 << 20), 1 << 20, 64, 32, 32, 128, machine=slow)
    by_way = {cost.way: cost for cost in costs}
    assert by_way["p2p"].hop_transfer > by_way["p2p"].hop_compute  # 5.4 ms against 3.4
    assert by_way["p2p"].exposed >= by_way["p2p"].transfer - by_way["p2p"].compute > 0
    assert "ulysses" not in by_way  # 32 heads do not split over 64 ranks
    assert [c.seconds for c in costs] == sorted(c.seconds for c in costs)


def test_one_rank_sends_nothing() -> None:
    (cost,) = estimate(causal_pairs(1000), 1000, 1, 8, 8, 64)
    assert cost.transfer == cost.exposed == 0


def test_command() -> None:
    result = CliRunner().invoke(app, ["ring", "--tokens", "65536", "--ranks", "8"])
    assert result.exit_code == 0 and "65,536 tokens on 8 ranks" in result.output
    assert all(way in result.output for way in ("p2p", "all_gather", "ulysses"))
    for wrong in (["--heads", "32", "--heads-k", "5"], ["--document", "-3"]):
        result = CliRunner().invoke(app, ["ring", *wrong])
        assert isinstance(result.exception, ValueError)
