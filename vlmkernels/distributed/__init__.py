"""Context parallelism: one long sequence on many ranks.

plan = ContextPlan(num_tokens, group=mesh, causal=True)      # the same on every rank
x, labels = plan.shard(x), plan.shard(labels)                # this rank's tokens
out = ring_attention(q, k, v, plan)                          # over all ranks' tokens
"""

from .attention import ring_attention
from .layout import Layout
from .mask import Mask, make_mask
from .plan import ContextPlan

__all__ = ["ContextPlan", "Layout", "Mask", "make_mask", "ring_attention"]
