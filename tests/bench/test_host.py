"""Host costs: every step is measured, and no op costs less than the allocations that it makes."""

from bench.host import microseconds, steps


def test_costs() -> None:
    figures = microseconds("cpu", rounds=3)
    assert list(figures) == list(steps("cpu"))
    assert all(us > 1 for us in figures.values())
    assert figures["rope"] > figures["nothing"]
