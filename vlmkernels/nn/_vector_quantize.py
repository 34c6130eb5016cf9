"""VectorQuantize and ResidualVQ: those of vector-quantize-pytorch, for what both have."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import mse_loss, normalize

from vlmkernels.nn._arguments import expect_tensors, typed
from vlmkernels.nn._vq_codebook import Codebook

# Arguments of vector-quantize-pytorch 1.32 that are only admitted at their defaults.
_DEFAULTS: dict[str, Any] = {
    "layernorm_after_project_in": False,
    "accept_3d_fmap": False,
    "sync_kmeans": True,
    "commitment_use_cross_entropy_loss": False,
    "orthogonal_reg_weight": 0.0,
    "orthogonal_reg_active_codes_only": False,
    "orthogonal_reg_max_codes": None,
    "codebook_diversity_loss_weight": 0.0,
    "codebook_diversity_temperature": 100.0,
    "stochastic_sample_codes": False,
    "sample_codebook_temp": 1.0,
    "straight_through": False,
    "directional_reparam": False,
    "directional_reparam_variance": 5e-3,
    "sync_affine_param": False,
    "vq_bridge": None,
    "manual_ema_update": False,
    "in_place_codebook_optimizer": None,
    "manual_in_place_optimizer_update": False,
    "affine_param": False,
    "affine_param_batch_decay": 0.99,
    "affine_param_codebook_decay": 0.9,
    "sync_update_v": 0.0,
    "route_gradients_to_input": True,
}


def _refuse(name: str, options: dict[str, Any]) -> None:
    for option, value in options.items():
        if option not in _DEFAULTS:
            raise TypeError(f"{name}: unknown argument {option!r}")
        if value != _DEFAULTS[option]:
            raise ValueError(
                f"{name}: {option} is not supported, must be {_DEFAULTS[option]!r}, got {value!r}"
            )


def _check_sizes(name: str, *sizes: int | None) -> None:
    for size in sizes:
        if size is not None and size < 1:
            raise ValueError(f"{name}: sizes must be positive, got {size}")


def rotate_to(x: Tensor, codes: Tensor) -> Tensor:
    """codes, with the gradient to x turned and scaled as x is turned to its code.

    Source: Fifty et al., "Restructuring vector quantization with the rotation trick", 2024, 4.2.
    """
    length, code_length = (t.detach().norm(dim=-1, keepdim=True) for t in (x, codes))
    u = x.detach() / length.clamp(min=1e-6)
    q = codes.detach() / code_length.clamp(min=1e-6)
    w = normalize(u + q, dim=-1, eps=1e-6)

    def along(direction: Tensor) -> Tensor:
        return (x * direction).sum(-1, keepdim=True)

    turned: Tensor = x - 2 * along(w) * w + 2 * along(u) * q
    scaled: Tensor = turned * (code_length / length.clamp(min=1e-6))
    return scaled


class VectorQuantize(torch.nn.Module):
    """quantized, indices, loss = vq(x): the nearest codes, which follow their tokens by EMA.

    Keyword-compatible with vector-quantize-pytorch's `VectorQuantize`, with its state_dict; the
    look-up is exact and makes no num_tokens x num_codes matrix. loss = commitment_weight times
    mean |x - sg(code)|^2 in training, 0 otherwise. In evaluation quantized has no gradient to x, as
    theirs. Arguments of theirs beyond those below are
    refused unless at their defaults.

    Args:
        dim: of the tokens. codebook_size: codes. codebook_dim: of a code, with projections where
            heads * codebook_dim is not dim.
        heads, separate_codebook_per_head: parts of a token, quantised each by itself.
        decay, eps, threshold_ema_dead_code, kmeans_init, kmeans_iters: see `Codebook`.
        use_cosine_sim: tokens and codes at length 1.
        channel_last, accept_image_fmap: x (batch, n, dim) or (batch, dim); (batch, dim, n); or
            (batch, dim, height, width).
        rotation_trick: the gradient of `rotate_to`, not straight through; None: on if dim > 1.
        learnable_codebook: codes are parameters, moved by the gradient of the loss; not by EMA.
        sync_codebook: None: in a process group of several ranks. process_group: which one.

    Raises:
        ValueError, TypeError: unsupported or unknown arguments, mask with images.
    """

    @typed
    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        heads: int = 1,
        separate_codebook_per_head: bool = False,
        decay: float = 0.8,
        eps: float = 1e-5,
        freeze_codebook: bool = False,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        *,
        use_cosine_sim: bool = False,
        threshold_ema_dead_code: float = 0,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        commitment_weight: float = 1.0,
        rotation_trick: bool | None = None,
        sync_codebook: bool | None = None,
        ema_update: bool | None = None,
        learnable_codebook: bool | None = None,
        return_zeros_for_masked_padding: bool = True,
        process_group: dist.ProcessGroup | None = None,
        **unsupported: Any,
    ) -> None:
        super().__init__()
        _refuse("VectorQuantize", unsupported)
        _check_sizes("VectorQuantize", dim, codebook_size, codebook_dim, heads)
        learnable = bool(learnable_codebook)
        ema = not learnable if ema_update is None else ema_update
        if learnable and (ema or use_cosine_sim):
            raise ValueError(
                "VectorQuantize: learnable_codebook excludes ema_update and use_cosine_sim"
            )
        inner = dim if codebook_dim is None else codebook_dim
        if sync_codebook is None:
            sync_codebook = dist.is_initialized() and dist.get_world_size(process_group) > 1
        self.dim, self.codebook_size, self.heads = dim, codebook_size, heads
        self.separate_codebook_per_head = separate_codebook_per_head
        self.channel_last, self.accept_image_fmap = channel_last, accept_image_fmap
        self.commitment_weight, self.freeze_codebook = commitment_weight, freeze_codebook
        self.rotation_trick = dim > 1 if rotation_trick is None else rotation_trick
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.learnable_codebook = learnable
        self.project_in: torch.nn.Module = torch.nn.Identity()
        self.project_out: torch.nn.Module = torch.nn.Identity()
        if inner * heads != dim:
            self.project_in = torch.nn.Linear(dim, inner * heads)
            self.project_out = torch.nn.Linear(inner * heads, dim)
        self._codebook = Codebook(
            inner, codebook_size, heads if separate_codebook_per_head else 1, decay=decay, eps=eps,
            threshold_ema_dead_code=threshold_ema_dead_code, kmeans_init=kmeans_init,
            kmeans_iters=kmeans_iters, use_cosine_sim=use_cosine_sim, ema_update=ema,
            learnable_codebook=learnable, sync=sync_codebook, process_group=process_group,
        )  # fmt: skip

    @property
    def codebook(self) -> Tensor:
        """(codebook_size, codebook_dim), or one for each head."""
        codes = self._codebook.embed
        return codes if self.separate_codebook_per_head else codes[0]

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        freeze_codebook: bool | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x: see channel_last. mask (batch, n), or lens (batch,): tokens that count; elsewhere
        the result is 0 (or x) and the index -1. indices (batch, n), and (..., heads) of several."""
        expect_tensors(self, x=x)
        tokens = self._tokens_last(x)
        mask = self._mask(tokens, mask, lens)
        frozen = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        with torch.autocast(x.device.type, enabled=False):
            rows, places = self._heads(self.project_in(tokens).float(), mask)
            quantized, indices, loss = self._look_up(rows, places, frozen)
        quantized = quantized.to(x.dtype).reshape(*tokens.shape[:-1], self.heads * rows.shape[-1])
        quantized = self.project_out(quantized)
        indices = indices.view(*tokens.shape[:-1], *([self.heads] * (self.heads > 1)))
        if mask is not None:
            other = 0 if self.return_zeros_for_masked_padding else tokens
            quantized = torch.where(mask[..., None], quantized, other)
            indices = indices.masked_fill(~(mask[..., None] if self.heads > 1 else mask), -1)
        if tokens is not x:
            quantized = quantized.movedim(-1, 1)
        return quantized, indices, loss

    def _tokens_last(self, x: Tensor) -> Tensor:
        first = self.accept_image_fmap or (not self.channel_last and x.ndim > 2)
        ranks = (4,) if self.accept_image_fmap else (2, 3)
        if not x.is_floating_point():
            raise TypeError(f"VectorQuantize: x must be floating point, got {x.dtype}")
        if x.ndim not in ranks or x.shape[1 if first else -1] != self.dim:
            names = "(batch, n, dim) or (batch, dim)" if self.channel_last else "(batch, dim, n)"
            raise ValueError(
                f"VectorQuantize: x must be {'images' if self.accept_image_fmap else names} with "
                f"dim {self.dim}, got {tuple(x.shape)}"
            )
        return x.movedim(1, -1) if first else x

    def _mask(self, tokens: Tensor, mask: Tensor | None, lens: Tensor | None) -> Tensor | None:
        if mask is None and lens is None:
            return None
        if (mask is not None and lens is not None) or tokens.ndim != 3:
            raise ValueError(
                "VectorQuantize: mask or lens, not both, and only for x (batch, n, dim), got x "
                f"{tuple(tokens.shape)}"
            )
        if lens is not None:
            if lens.shape != tokens.shape[:1] or lens.is_floating_point():
                raise ValueError(
                    f"VectorQuantize: lens must be integers ({len(tokens)},), got {lens.dtype} "
                    f"{tuple(lens.shape)}"
                )
            mask = torch.arange(tokens.shape[1], device=tokens.device) < lens[:, None]
        assert mask is not None
        if mask.dtype != torch.bool or mask.shape != tokens.shape[:2]:
            raise ValueError(
                f"VectorQuantize: mask must be bool {tuple(tokens.shape[:2])}, got {mask.dtype} "
                f"{tuple(mask.shape)}"
            )
        return mask

    def _heads(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(num_codebooks, rows, codebook_dim), and which rows count."""
        rows = x.reshape(-1, self.heads, x.shape[-1] // self.heads)
        places = None if mask is None else mask.flatten()
        if self.separate_codebook_per_head:
            return rows.transpose(0, 1), places
        if places is not None:
            places = places.repeat_interleave(self.heads)
        return rows.flatten(0, 1)[None], places

    def _look_up(
        self, x: Tensor, places: Tensor | None, frozen: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = self._codebook._unit(x)
        codebooks = self._codebook.embed.float()
        found = self._codebook(x, places, update=not frozen)
        quantized = torch.stack([f.quantized for f in found])
        if not (self.training and x.requires_grad):  # then codes are looked up and no more
            quantized = quantized.detach()
            if self.learnable_codebook:
                pairs = zip(codebooks, found, strict=True)
                quantized = torch.stack([codes[f.indices] for codes, f in pairs])
        indices = torch.stack([f.indices for f in found])
        loss = x.new_zeros(())
        if self.training:
            codes = quantized.detach()
            if self.commitment_weight > 0:
                loss = self._loss(x, found, codes, places, frozen) * self.commitment_weight
            if self.rotation_trick and x.requires_grad:
                quantized = rotate_to(x, codes)
        if self.separate_codebook_per_head:
            return quantized.transpose(0, 1), indices.t(), loss
        return quantized, indices, loss

    def _loss(
        self, x: Tensor, found: Any, codes: Tensor, places: Tensor | None, frozen: bool
    ) -> Tensor:
        if self._codebook.metric == "cosine":
            return (
                mse_loss(x, codes) if places is None else mse_loss(x[:, places], codes[:, places])
            )

        def mean(distances: list[Tensor]) -> Tensor:
            stacked = torch.stack(distances)
            return (stacked if places is None else stacked[:, places]).mean() / x.shape[-1]

        loss = mean([f.distance for f in found])
        if self.learnable_codebook and not frozen:  # the same value, the gradient of both
            to_codes = mean([f.codebook_distance for f in found])
            loss = loss + (to_codes - to_codes.detach())
        return loss

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """indices as `forward` gives them; codes (..., heads * codebook_dim)."""
        codes = self._codebook.embed
        if self.separate_codebook_per_head:
            heads = [c[i] for c, i in zip(codes, indices.unbind(-1), strict=True)]
            return torch.stack(heads, -2).flatten(-2)
        found = codes[0][indices]
        return found.flatten(-2) if self.heads > 1 else found

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What `forward` gives for these indices, channels last."""
        return self.project_out(self.get_codes_from_indices(indices))  # type: ignore[no-any-return]


class ResidualVQ(torch.nn.Module):
    """quantized = sum of num_quantizers look-ups, each of what the ones before left over.

    Keyword-compatible with vector-quantize-pytorch's `ResidualVQ` (codebooks not shared, no
    dropout of quantisers, no beam search), with its state_dict. Other arguments: `VectorQuantize`.
    Returns (quantized, indices (..., num_quantizers), losses (num_quantizers,)).

    Source: Zeghidour et al., "SoundStream", 2021, algorithm 1.
    """

    @typed
    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        _check_sizes("ResidualVQ", dim, num_quantizers, codebook_size, codebook_dim)
        inner = dim if codebook_dim is None else codebook_dim
        self.project_in: torch.nn.Module = torch.nn.Identity()
        self.project_out: torch.nn.Module = torch.nn.Identity()
        if inner != dim:
            self.project_in = torch.nn.Linear(dim, inner)
            self.project_out = torch.nn.Linear(inner, dim)
        if options.get("heads", 1) != 1:
            raise ValueError(f"ResidualVQ: heads must be 1, got {options['heads']}")
        self.layers = torch.nn.ModuleList(
            VectorQuantize(inner, codebook_size, **options) for _ in range(num_quantizers)
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        expect_tensors(self, x=x)
        residual = self.project_in(x)
        quantized = torch.zeros_like(residual)
        indices, losses = [], []
        for layer in self.layers:
            found, index, loss = layer(residual, mask=mask)
            residual = residual - found.detach()
            quantized = quantized + found
            indices.append(index)
            losses.append(loss)
        return self.project_out(quantized), torch.stack(indices, -1), torch.stack(losses)
