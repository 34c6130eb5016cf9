"""Fused CUDA kernels for vision-language models.

    vlmkernels.ops          functions of tensors, forward and backward
    vlmkernels.nn           drop-in modules with the state_dict keys of what they replace
    vlmkernels.models       complete models: load(path), load_processor(path)
    vlmkernels.compat       other libraries' functions: flash_attn
    vlmkernels.patch        transformers' models on these ops: patch_model(model)
    vlmkernels.distributed  ring attention and losses over processes
    vlmkernels.recipes      whole tasks, trained and measured
    vlmkernels.info         what this installation is: backends(), report()

Import the one you use: `from vlmkernels import nn`.
"""

from importlib import metadata as _metadata

__all__ = ["__version__"]

try:
    __version__ = _metadata.version("vlmkernels")
except _metadata.PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0.0.0+source"
