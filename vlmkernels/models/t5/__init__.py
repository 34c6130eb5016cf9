"""T5 and FlanT5 (arXiv 1910.10683, 2210.11416): the language model of BLIP-2's larger half."""

from .config import T5Config
from .language import Memory, T5Language, T5State
from .model import T5
from .weights import own_name, tied_names

__all__ = ["T5", "Memory", "T5Config", "T5Language", "T5State", "own_name", "tied_names"]
