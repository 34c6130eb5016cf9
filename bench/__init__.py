"""Benches of the ops and, end to end, of the models: `vlmkernels bench`, `make bench`."""

import os

# PyTorch's profiler, which counts memory here, warns about every block that is older than itself.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
