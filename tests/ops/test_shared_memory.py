"""What a CTA asks for is what the GPU has: less on sm_86, sm_89 and sm_120 than on sm_80."""

import re

import pytest

from tests.conftest import need_emulated_core
from tests.ops.attention_cases import run_emulated

PROGRAM = """
import torch
from vlmkernels import ops

def randn(*shape, grad=True):
    return torch.randn(shape).bfloat16().requires_grad_(grad)

for dim in (128, 256, 1024):
    ops.vq_lookup(randn(4, dim, grad=False), randn(9, dim, grad=False))
for tokens, head_dim in ((260, 64), (20, 128)):
    tensors = randn(1, 33, 1, head_dim), randn(1, tokens, 16), *(randn(head_dim, 16) for _ in "kv")
    ops.qformer_attention(*tensors).sum().backward()
for head_dim in (128, 256):
    q, k, v = (randn(1, 9, 1, head_dim) for _ in range(3))
    bias = randn(1, 1, 9, 9)
    ops.attention(q, k, v, causal=True).sum().backward()
    ops.attention(q, k, v, bias=bias).sum().backward()
    cache = k.detach(), v.detach(), torch.tensor([9], dtype=torch.int32)
    ops.attention_decode(q.detach()[:, :1], *cache)
ops.patch_embed(randn(1, 3, 28, 28), randn(16, 3, 14, 14)).sum().backward()
ops.clip_loss(randn(9, 64), randn(9, 64), torch.ones(())).backward()
"""


@pytest.mark.parametrize(("arch", "most"), [("80", 163), ("86", 99)])
def test_shared_memory(arch: str, most: int) -> None:
    need_emulated_core()
    text = run_emulated(PROGRAM, PTXEMU_STATS="1", VLMKERNELS_ARCH=arch).stderr
    sizes = [int(a) + int(b) for a, b in re.findall(r"smem (\d+)\+(\d+):", text)]
    kernels = ("vq_lookup", "qformer_attention", "attention_fwd", "attention_decode", "dbias")
    assert [name for name in kernels if name not in text] == [] and len(sizes) > 20
    assert 48 * 1024 < max(sizes) <= most * 1024
