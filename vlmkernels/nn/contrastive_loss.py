"""ClipLoss and SigLipLoss: open_clip's modules over `vlmkernels.ops`, on one process or many."""

import torch
import torch.distributed as dist
from torch import Tensor

from vlmkernels import ops
from vlmkernels.distributed import contrastive_loss as distributed
from vlmkernels.nn._arguments import typed


class _ContrastiveLoss(torch.nn.Module):
    def __init__(
        self,
        cache_labels: bool,
        rank: int,
        world_size: int,
        group: dist.ProcessGroup | None,
    ) -> None:
        super().__init__()
        if not 0 <= rank < world_size:
            raise ValueError(
                f"{type(self).__name__}: rank must be in [0, world_size = {world_size}), got {rank}"
            )
        self.cache_labels, self.rank, self.world_size = cache_labels, rank, world_size
        self.group = group

    def _expect_group(self) -> None:
        name = type(self).__name__
        if not dist.is_initialized():
            raise ValueError(
                f"{name}: world_size = {self.world_size} needs torch.distributed, "
                "which is not initialized"
            )
        here = (dist.get_rank(self.group), dist.get_world_size(self.group))
        if here != (self.rank, self.world_size):
            raise ValueError(
                f"{name}: rank, world_size must be those of the process group {here}, "
                f"got {(self.rank, self.world_size)}"
            )

    def extra_repr(self) -> str:
        return f"rank={self.rank}, world_size={self.world_size}"


class ClipLoss(_ContrastiveLoss):
    """`vlmkernels.ops.clip_loss`, and over processes `vlmkernels.distributed.contrastive_loss`.

    Drop-in for open_clip's `ClipLoss` (3.3.0): the same arguments, loss and gradients, the loss in
    fp32. There is nothing to cache: cache_labels is ignored. use_horovod is a ValueError.
    With world_size > 1 what is gathered there goes round a ring here; see `local_loss` and
    `gather_with_grad` of the function. logit_scale's gradient is that of the mean loss on every
    process, which open_clip has after averaging.

    group: process group of rank and world_size; None: the default one.
    """

    @typed
    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(cache_labels, rank, world_size, group)
        if use_horovod:
            raise ValueError("ClipLoss: use_horovod must be False: torch.distributed is used")
        self.local_loss, self.gather_with_grad = local_loss, gather_with_grad
        self.use_horovod = use_horovod

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """image_features, text_features: (batch, dim); the loss, or {"contrastive_loss": loss}."""
        features = (image_features, text_features, logit_scale)
        if self.world_size > 1:
            self._expect_group()
            loss = distributed.clip_loss(
                *features,
                self.group,
                local_loss=self.local_loss,
                gather_with_grad=self.gather_with_grad,
            )
        else:
            loss = ops.clip_loss(*features)
        if logit_bias is not None:  # cancels in a softmax; as a parameter it gets a gradient, zero
            loss = loss + 0 * (logit_bias.sum() if isinstance(logit_bias, Tensor) else logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(_ContrastiveLoss):
    """`vlmkernels.ops.siglip_loss`, and over processes `vlmkernels.distributed.contrastive_loss`.

    Drop-in for open_clip's `SigLipLoss` (3.3.0): the same arguments, loss and gradients, the loss
    in fp32. dist_impl: "bidir", "shift", "reduce" or "gather"; they differ in who sends what when,
    here it is always one ring. cache_labels is ignored. group: as of `ClipLoss`.
    """

    @typed
    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        *,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(cache_labels, rank, world_size, group)
        self.dist_impl = dist_impl or "bidir"
        known = ("bidir", "shift", "reduce", "gather")
        if self.dist_impl not in known:
            raise ValueError(f"SigLipLoss: dist_impl must be one of {known}, got {dist_impl!r}")

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """image_features, text_features: (batch, dim); the loss, or {"contrastive_loss": loss}."""
        arguments = (image_features, text_features, logit_scale, logit_bias)
        if self.world_size > 1:
            self._expect_group()
            loss = distributed.siglip_loss(*arguments, self.group)
        else:
            loss = ops.siglip_loss(*arguments)
        return {"contrastive_loss": loss} if output_dict else loss
