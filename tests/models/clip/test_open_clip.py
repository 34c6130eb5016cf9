"""open_clip's layout: against a model with its names, built from PyTorch's own modules."""

from __future__ import annotations

import json
import shutil
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.models.clip.conftest import make_tokenizer
from tests.models.common import randomize
from vlmkernels.models import load, load_processor
from vlmkernels.models.clip import Clip, ClipConfig

CONFIG = {
    "model_cfg": {
        "embed_dim": 24,
        "vision_cfg": {
            "image_size": 32,
            "layers": 2,
            "width": 48,
            "head_width": 16,
            "mlp_ratio": 4.9231,
            "patch_size": 8,
        },
        "text_cfg": {"context_length": 16, "vocab_size": 90, "width": 32, "heads": 2, "layers": 2},
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
}


class Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        layers = [("c_fc", nn.Linear(width, mlp)), ("gelu", nn.GELU())]
        self.mlp = nn.Sequential(OrderedDict([*layers, ("c_proj", nn.Linear(mlp, width))]))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Blocks(nn.Module):
    def __init__(self, width: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, mlp) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 48, 8, 8, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(48))
        self.positional_embedding = nn.Parameter(torch.empty(17, 48))
        self.ln_pre, self.ln_post = nn.LayerNorm(48), nn.LayerNorm(48)
        self.transformer = Blocks(48, 3, 236)
        self.proj = nn.Parameter(torch.empty(48, 24))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)
        x = self.transformer(self.ln_pre(x + self.positional_embedding))
        return self.ln_post(x[:, 0]) @ self.proj


class OpenClip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = Visual()
        self.transformer = Blocks(32, 2, 128)
        self.token_embedding = nn.Embedding(90, 32)
        self.positional_embedding = nn.Parameter(torch.empty(16, 32))
        self.ln_final = nn.LayerNorm(32)
        self.text_projection = nn.Parameter(torch.empty(32, 24))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def encode_text(self, ids: Tensor) -> Tensor:
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        mask = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)
        x = self.ln_final(self.transformer(x, mask))
        return x[torch.arange(len(x)), ids.argmax(dim=-1)] @ self.text_projection


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, OpenClip]:
    theirs = OpenClip()
    randomize(theirs)
    for norm in (theirs.ln_final, theirs.visual.ln_pre, theirs.visual.ln_post):
        nn.init.normal_(norm.weight, 1.0, 0.1)
    path = tmp_path / "open_clip"
    path.mkdir()
    save_file(theirs.state_dict(), path / "open_clip_model.safetensors")
    (path / "open_clip_config.json").write_text(json.dumps(CONFIG))
    make_tokenizer().save_pretrained(path)
    return path, theirs.eval()


def test_embeddings_match_open_clips_own_modules(written: tuple[Path, OpenClip]) -> None:
    path, theirs = written
    model = load(path)
    assert model.config.vision.intermediate_size == 236 and model.config.vision.hidden_act == "gelu"
    pixels = torch.randn(3, 3, 32, 32)
    ids = torch.tensor([[80, 4, 9, 81, 0, 0], [80, 1, 2, 3, 4, 81], [80, 7, 81, 0, 0, 0]])
    image = model.encode_image(pixels, normalize=False)
    torch.testing.assert_close(image, theirs.visual(pixels), rtol=0, atol=1e-4)
    text = model.encode_text(ids, normalize=False)
    torch.testing.assert_close(text, theirs.encode_text(ids), rtol=0, atol=1e-4)
    assert model.logit_scale == theirs.logit_scale


def test_round_trip_and_the_other_layout(written: tuple[Path, OpenClip], tmp_path: Path) -> None:
    path, theirs = written
    model = load(path)
    model.save_open_clip(tmp_path / "again")
    again = load_file(tmp_path / "again" / "open_clip_model.safetensors")
    state = theirs.state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)
    assert load(tmp_path / "again").config == model.config
    model.save_pretrained(tmp_path / "hf")
    pixels = torch.randn(1, 3, 32, 32)
    other = load(tmp_path / "hf").encode_image(pixels)
    assert torch.equal(other, model.encode_image(pixels))
    with pytest.raises(ValueError, match=r"expected a directory without config\.json"):
        model.save_open_clip(tmp_path / "hf")


def test_published_sizes_read_back_from_their_config() -> None:
    from vlmkernels.models.clip import open_clip

    for name in ("B/32", "L/14-336", "H/14", "bigG/14"):
        config = ClipConfig.preset(name)
        config.text.eos_token_id = 2
        assert open_clip.config_from(open_clip.config_to(config)) == config
    names = open_clip.open_clip_state(
        dict(Clip.on_meta(ClipConfig.preset("B/32")).state_dict()), ClipConfig.preset("B/32")
    )
    assert names["visual.transformer.resblocks.11.attn.in_proj_weight"].shape == (2304, 768)
    assert names["visual.proj"].shape == (768, 512)


def test_the_processor_reads_mean_and_size(written: tuple[Path, OpenClip]) -> None:
    processor = load_processor(written[0])
    assert processor.image.image_mean == (0.5, 0.5, 0.5)
    assert (processor.image.size, processor.image.crop_size) == (32, (32, 32))
    assert processor.max_seqlen == 16


def test_unknown_and_missing_names_are_listed(
    written: tuple[Path, OpenClip], tmp_path: Path
) -> None:
    path = Path(shutil.copytree(written[0], tmp_path / "broken"))
    state = load_file(path / "open_clip_model.safetensors")
    del state["transformer.resblocks.1.attn.in_proj_bias"]
    state["transformer.resblocks.1.ls_1.gamma"] = torch.zeros(32)
    state["visual.transformer.resblocks.0.attn.in_proj_weight"] = torch.zeros(48, 48)
    save_file(state, path / "open_clip_model.safetensors")
    with pytest.raises(ValueError) as error:
        load(path)
    for part in (
        "missing: text_model.encoder.layers.1.self_attn.k_proj.bias",
        "unexpected: transformer.resblocks.1.ls_1.gamma",
        "vision_model.encoder.layers.0.self_attn.q_proj.weight: expected (48, 48), got (16, 48)",
    ):
        assert part in str(error.value)
