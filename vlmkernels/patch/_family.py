"""What a file of this folder says of its family."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from vlmkernels.patch._swap import Swap


@dataclass(frozen=True)
class Family:
    """The classes of `transformers.models.<name>.modeling_<name>`, all of them by name, so that one
    that appears or is renamed there is an error instead of a kernel that no longer runs.

    Args:
        swaps: classes and how their objects are swapped.
        others: classes that stay, beside those of PreTrainedModel: they only hold others.
        own_attention: models that keep their attn_implementation.
    """

    name: str
    swaps: Mapping[str, tuple[Swap, ...]] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    own_attention: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        return f"transformers.models.{self.name}.modeling_{self.name}"
