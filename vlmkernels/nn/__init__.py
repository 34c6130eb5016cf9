"""Drop-in modules: parameters and a call, with the state_dict keys of what they replace."""

from vlmkernels.nn.null import Null

__all__ = ["Null"]
