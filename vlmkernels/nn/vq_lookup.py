"""VectorQuantizer: the quantiser of taming-transformers and diffusers, with an exact look-up."""

from typing import Any

import torch
from torch import Tensor

from vlmkernels import ops
from vlmkernels.nn._arguments import expect_tensors, typed

Info = tuple[None, None, Tensor]


class VectorQuantizer(torch.nn.Module):
    """z_q = the nearest code of each pixel; loss = the commitment and codebook losses.

    Drop-in for taming's `VectorQuantizer2(n_e, e_dim, beta, ...)` and diffusers'
    `VectorQuantizer(n_e, vq_embed_dim, beta, ...)`: same arguments, results and state_dict
    (`embedding.weight`). legacy=True, their default, puts beta on the codebook loss:

        legacy      mean (sg(z_q) - z)^2 + beta mean (z_q - sg(z))^2
        otherwise   beta mean (sg(z_q) - z)^2 + mean (z_q - sg(z))^2

    z_q is the code itself, where theirs is z + (z_q - z) with its rounding; its gradient goes
    straight through to z. The look-up is in fp32 also under autocast.

    Raises:
        ValueError: remap is given (a re-indexing that no published model of these two needs).
    """

    @typed
    def __init__(
        self,
        n_e: int,
        e_dim: int | None = None,
        beta: float = 0.25,
        remap: object = None,
        unknown_index: str = "random",
        sane_index_shape: bool = False,
        legacy: bool = True,
        *,
        vq_embed_dim: int | None = None,
    ) -> None:
        super().__init__()
        dim = vq_embed_dim if e_dim is None else e_dim
        if dim is None or (vq_embed_dim is not None and vq_embed_dim != dim):
            raise ValueError(
                "VectorQuantizer: expected one of e_dim and vq_embed_dim, got "
                f"{e_dim} and {vq_embed_dim}"
            )
        if n_e < 1 or dim < 1:
            raise ValueError(f"VectorQuantizer: sizes must be positive, got {n_e} and {dim}")
        if remap is not None:
            raise ValueError(f"VectorQuantizer: remap must be None, got {remap!r}")
        self.n_e, self.e_dim, self.beta = n_e, dim, beta
        self.legacy, self.sane_index_shape = legacy, sane_index_shape
        self.unknown_index = unknown_index
        self.embedding = torch.nn.Embedding(n_e, dim)
        torch.nn.init.uniform_(self.embedding.weight, -1 / n_e, 1 / n_e)

    def forward(self, z: Tensor, **options: Any) -> tuple[Tensor, Tensor, Info]:
        """z: (batch, e_dim, height, width). Returns (z_q, loss, (None, None, indices)); indices
        (batch * height * width,), or (batch, height, width) with sane_index_shape."""
        wrong = {k: v for k, v in options.items() if v not in _GUMBEL.get(k, ())}
        if wrong:
            raise ValueError(f"VectorQuantizer: options of a Gumbel quantiser, got {wrong}")
        expect_tensors(self, z=z)
        if z.ndim != 4 or z.shape[1] != self.e_dim:
            raise ValueError(
                f"VectorQuantizer: z must have shape (batch, {self.e_dim}, height, width), got "
                f"{tuple(z.shape)}"
            )
        batch, dim, height, width = z.shape
        tokens = z.permute(0, 2, 3, 1).reshape(-1, dim)
        weight = self.embedding.weight
        found = ops.vq_lookup(tokens.to(weight.dtype), weight)
        commitment = found.distance.mean() / dim
        codebook = found.codebook_distance.mean() / dim
        if self.legacy:
            loss = commitment + self.beta * codebook
        else:
            loss = self.beta * commitment + codebook
        z_q = found.quantized.to(z.dtype).view(batch, height, width, dim)
        indices = found.indices
        if self.sane_index_shape:
            indices = indices.view(batch, height, width)
        return z_q.permute(0, 3, 1, 2).contiguous(), loss, (None, None, indices)

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, ...] | None) -> Tensor:
        """The codes; with shape (batch, height, width, e_dim) as (batch, e_dim, height, width)."""
        z_q: Tensor = self.embedding(indices)
        return z_q if shape is None else z_q.view(shape).permute(0, 3, 1, 2).contiguous()

    def extra_repr(self) -> str:
        return f"beta={self.beta}, legacy={self.legacy}"


# What taming's forward admits "for interface compatible with Gumbel".
_GUMBEL: dict[str, tuple[Any, ...]] = {
    "temp": (None, 1.0),
    "rescale_logits": (False,),
    "return_logits": (False,),
}
