"""Whatever the sizes are: vq_lookup finds the float64 argmin, packed images are those in a row."""

from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import Backend
from tests.ops.test_patch_embed_pixels import PLAIN, expected
from tests.ops.vq_cases import assert_exact
from vlmkernels import ops


def drawn(backend: Backend) -> Any:
    """Always the same examples; fewer where every instruction is interpreted."""
    return settings(
        max_examples=25 if backend.small else 200,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )


def test_nearest_code(backend: Backend) -> None:
    """Tokens half way between two codes, to within some last bits of fp32, from 2^-20 to 2^20."""

    @drawn(backend)
    @given(
        num_tokens=st.integers(1, 70),
        num_codes=st.integers(2, 150),
        dim=st.integers(1, 80),
        exponent=st.integers(-20, 20),
        last_bits=st.integers(0, 8),
        shift=st.sampled_from([0.0, 1.0, 100.0]),
        metric=st.sampled_from(["euclidean", "cosine"]),
        seed=st.integers(0, 99),
    )
    def check(
        num_tokens: int,
        num_codes: int,
        dim: int,
        exponent: int,
        last_bits: int,
        shift: float,
        metric: str,
        seed: int,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randn(num_codes, dim, generator=generator) + shift
        pairs = torch.randint(num_codes, (num_tokens, 2), generator=generator)
        bits = torch.randint(-last_bits, last_bits + 1, (num_tokens, dim), generator=generator)
        z = codes[pairs].mean(1) * (1 + bits * 2.0**-23)
        z, codes = (x.to(backend.device) * 2.0**exponent for x in (z, codes))
        assert_exact(ops.vq_lookup(z, codes, metric=metric), z, codes, metric)

    check()


def test_ragged_images(backend: Backend) -> None:
    """Small integers, so that the result is exact."""

    @drawn(backend)
    @given(
        sizes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=5),
        patch=st.integers(1, 9),
        merge=st.integers(1, 3),
        channels=st.sampled_from([1, 3]),
        hidden_dim=st.integers(1, 40),
        dtype=st.sampled_from([torch.uint8, backend.dtypes[-1]]),
    )
    def check(
        sizes: list[tuple[int, int]],
        patch: int,
        merge: int,
        channels: int,
        hidden_dim: int,
        dtype: torch.dtype,
    ) -> None:
        unit = patch * merge
        images = [
            torch.randint(0, 2, (channels, h * unit, w * unit)).to(backend.device, dtype)
            for h, w in sizes
        ]
        shape = (hidden_dim, channels, patch, patch)
        weight = torch.randint(-1, 2, shape).to(backend.device, backend.dtypes[-1])
        how = PLAIN | {"mean": [0.0] * channels, "std": [1.0] * channels}
        got = ops.patch_embed_pixels(images, weight, **how, merge_size=merge)
        want = expected(images, weight.double(), None, None, how, merge)
        assert torch.equal(got.double(), want)

    check()
