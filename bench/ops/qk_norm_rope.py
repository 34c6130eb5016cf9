"""qk_norm_rope against transformers' Qwen3-VL code: q_norm, k_norm and apply_rotary_pos_emb.

qk_norm_rope computes cos and sin in every call; eager and qk_norm_rope_from_tables read tables that
were made once for all layers. q and k are slices of a fused qkv, as an efficient model has them.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.case import Case, both_directions, dtype_name
from bench.ops.norm import eager_rms_norm
from bench.ops.rope import eager_text
from vlmkernels.ops._rotation import angles as angles_of

SECTIONS, THETA, HEAD_DIM = (24, 20, 20), 5e6, 128
# hub Qwen/Qwen3-VL-{2B,8B}-Instruct config.json: name, num_heads, num_heads_k; tokens on a CPU
SHAPES = (("qwen3vl_2b", 16, 8, 512), ("qwen3vl_8b", 32, 8, 256), ("qwen3vl_8b", 32, 8, 8))


def cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    for name, num_heads, num_heads_k, tokens in SHAPES:
        tokens = tokens * 16 if device.startswith("cuda") else tokens
        heads = [num_heads, num_heads_k, num_heads_k]
        qkv = torch.randn(tokens, sum(heads), HEAD_DIM, device=device).to(dtype)
        q, k, _ = qkv.requires_grad_().split(heads, dim=1)
        weights = {
            w: torch.randn(HEAD_DIM, device=device).to(dtype).requires_grad_()
            for w in ("q_weight", "k_weight")
        }
        steps = torch.arange(1, 4, device=device)[:, None]
        positions = (torch.arange(tokens, device=device) * steps) % 1000
        half = angles_of(positions, THETA, HEAD_DIM, SECTIONS, "interleaved")
        angles = torch.cat([half, half], dim=-1)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

        def eager(
            q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
        ) -> tuple[Tensor, Tensor]:
            return eager_text(eager_rms_norm(q, q_weight), eager_rms_norm(k, k_weight), cos, sin)

        def eager_of_positions(
            q: Tensor,
            k: Tensor,
            q_weight: Tensor,
            k_weight: Tensor,
            cos: Tensor = cos,
            sin: Tensor = sin,
            **_: Any,
        ) -> tuple[Tensor, Tensor]:
            return eager(q, k, q_weight, k_weight, cos, sin)

        numbers = q.numel() + k.numel()
        common: dict[str, Any] = {
            "shape": f"{name} {tokens} {num_heads}+{num_heads_k}x{HEAD_DIM}",
            "dtype": dtype_name(q),
            # Forward reads and writes q and k; backward reads them and their gradients.
            "bytes": (2 * numbers * q.itemsize, 3 * numbers * q.itemsize),
            "flops": (7 * numbers, 16 * numbers),
        }
        given = {"q": q, "k": k, **weights}
        options = {"sections": SECTIONS, "interleaved": True, "theta": THETA}
        inputs = {**given, "position_ids": positions, **options}
        yield from both_directions(
            "qk_norm_rope", inputs, eager_of_positions, op="qk_norm_rope", **common
        )
        tables = {**given, "cos": cos, "sin": sin}
        function = "qk_norm_rope_from_tables"
        yield from both_directions(function, tables, eager, op=function, **common)
