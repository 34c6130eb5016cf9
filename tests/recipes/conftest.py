"""Fixtures of the recipes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.models.blip2.conftest import write as write_blip2
from tests.models.blip2.conftest import write_tokenizer
from tests.models.clip.conftest import write as write_clip
from tests.models.common import randomize
from tests.models.llava.conftest import write as write_llava
from tests.models.qwen2_5_vl.conftest import write as write_qwen2_5_vl
from tests.models.qwen2_vl.conftest import write as write_qwen2_vl
from tests.models.qwen_vl.conftest import write as write_qwen_vl
from vlmkernels.models.blip2 import (
    Blip2Config,
    Blip2Pretraining,
    Blip2QFormerConfig,
    Blip2VisionConfig,
)
from vlmkernels.models.blip2.config import PRETRAINING

from .common import CAPTIONS, write_data


def write_first_stage(path: Path) -> None:
    """BLIP-2 before it has a language model."""
    config = Blip2Config(
        PRETRAINING,
        num_query_tokens=4,
        image_text_hidden_size=24,
        caption_token_id=159,
        vision=Blip2VisionConfig(32, 48, 2, 2, image_size=32, patch_size=8),
        qformer=Blip2QFormerConfig(
            *(160, 48, 2, 3, 64), encoder_hidden_size=32, use_qformer_text_input=True
        ),
    )
    model = Blip2Pretraining(config)
    randomize(model)
    model.save_pretrained(path)
    write_tokenizer(path, "bert")


@pytest.fixture(scope="package")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint under the name of each recipe, captions/, chats/."""
    folder = tmp_path_factory.mktemp("stages")
    for kind in ("opt", "t5"):
        write_blip2(folder / kind, kind)
    write_first_stage(folder / "blip2")
    write_clip(folder / "clip")
    write_llava(folder / "llava")
    write_qwen_vl(folder / "qwen_vl")
    write_qwen2_5_vl(folder / "qwen2_5_vl")
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
