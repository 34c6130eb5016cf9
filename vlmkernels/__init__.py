"""Fused CUDA kernels for vision-language models: functions, modules, models, recipes."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("vlmkernels")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0.0.0+source"
