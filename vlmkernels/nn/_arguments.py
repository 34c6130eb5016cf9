"""What modules check that look at their inputs before an op does."""

from torch import Tensor


def expect_tensors(module: object, **arguments: object) -> None:
    """TypeError naming module and argument unless all are tensors."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            where = f"{type(module).__name__}: {name}"
            raise TypeError(f"{where} must be a torch.Tensor, got {type(value).__name__}")
