"""Drop-in modules: parameters and a call, with the state_dict keys of what they replace."""

from vlmkernels.nn.null import Null
from vlmkernels.nn.patch_embed import PatchEmbed2d, PatchEmbed3d

__all__ = ["Null", "PatchEmbed2d", "PatchEmbed3d"]
