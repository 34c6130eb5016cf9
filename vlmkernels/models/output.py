"""What models return."""

from __future__ import annotations

from dataclasses import fields
from typing import Any


class Output:
    """A dataclass of tensors that also reads as transformers' tuple: the loss, if there is one,
    then what else is not None. Its Trainer takes `output[0]` and, to evaluate, `output[1:]`."""

    def __getitem__(self, index: Any) -> Any:
        given = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        loss = given.pop("loss")
        return tuple(x for x in (loss, *given.values()) if x is not None)[index]
