"""Benches of vlmkernels.distributed."""
