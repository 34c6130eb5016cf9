"""Fixtures of the recipes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.models.blip2.conftest import write as write_blip2
from tests.models.clip.conftest import write as write_clip
from tests.models.llava.conftest import write as write_llava
from tests.models.qwen2_vl.conftest import write as write_qwen2_vl

from .common import CAPTIONS, write_data


@pytest.fixture(scope="package")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint under the name of each recipe, captions/, chats/."""
    folder = tmp_path_factory.mktemp("stages")
    for kind in ("opt", "t5"):
        write_blip2(folder / kind, kind)
    write_clip(folder / "clip")
    write_llava(folder / "llava")
    write_qwen2_vl(folder / "qwen2_vl")
    write_data(folder / "captions", CAPTIONS)
    write_data(folder / "chats", CAPTIONS[:3], text_only=3)
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
