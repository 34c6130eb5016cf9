"""Context parallelism: one long sequence on many ranks.

plan = ContextPlan(num_tokens, group=mesh, causal=True)  # the same on every rank
x, labels = plan.shard(x), plan.shard(labels)  # this rank's tokens
out = ring_attention(q, k, v, plan)  # over all ranks' tokens

with context_parallel(mesh):  # or let a model of this package do all of that
    loss = model(**batch, labels=labels).loss
"""

from .attention import ring_attention
from .context import context_parallel
from .layout import Layout
from .mask import Mask, make_mask
from .plan import ContextPlan

__all__ = ["ContextPlan", "Layout", "Mask", "context_parallel", "make_mask", "ring_attention"]
