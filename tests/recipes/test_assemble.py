"""A CLIP and a LLaMA become a LLaVA, which the first stage trains."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from tests.models.common import randomize, run_command, state_of
from tests.models.llava.conftest import write_tokenizer
from vlmkernels.models import load, load_processor
from vlmkernels.recipes.llava.initial import assemble

from .common import command

WORDS = 90  # of the tokenizer, with its special tokens


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without a token for images."""
    path = tmp_path_factory.mktemp("llama")
    assert write_tokenizer(path, ["<unk>", "<s>", "</s>"]).get_vocab_size() == WORDS
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    sizes = {"vocab_size": WORDS, "hidden_size": 64, "intermediate_size": 96}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, bos_token_id=1, eos_token_id=2)
    model = transformers.LlamaForCausalLM(config)
    randomize(model)
    model.save_pretrained(path)
    return path


def test_it_is_both_models(llama: Path, place: Path, tmp_path: Path) -> None:
    assemble(place / "clip", llama, tmp_path / "out")
    model, processor = load(tmp_path / "out"), load_processor(tmp_path / "out")
    ids = torch.tensor([processor.tokenizer.encode("a cat and a dog", add_special_tokens=True)])
    hf = transformers.LlamaForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        expected, found = hf(ids).logits, model(ids).logits
    assert found.shape[-1] == 128 and model.config.image_token_index == WORDS
    torch.testing.assert_close(found[..., :WORDS], expected, rtol=1e-4, atol=1e-4)
    mean = hf.lm_head.weight.mean(dim=0).detach()
    torch.testing.assert_close(model.head_weight[WORDS:].detach(), mean.expand(38, -1))
    tower = {n: w for n, w in state_of(place / "clip").items() if n.startswith("vision_model.")}
    ours = model.vision_tower.state_dict()
    assert ours.keys() == {n for n in tower if "position_ids" not in n}
    assert all(torch.equal(ours[name], tower[name]) for name in ours)


def test_the_first_stage_goes_on_from_it(
    llama: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    args = ["train", "llava-init", "--vision", str(place / "clip"), "--language", str(llama)]
    code, _, err = run_command([*args, "--out", str(tmp_path / "init")], monkeypatch, capsys)
    assert (code, err) == (0, "")
    settings = "steps = 2\nbatch = 4\nmicro_batch = 2\n"
    args = command(place, tmp_path / "one", settings, model=tmp_path / "init")
    code, _, err = run_command(args, monkeypatch, capsys)
    assert (code, err) == (0, "")
    before, after = (load(tmp_path / name, dtype=torch.bfloat16) for name in ("init", "one"))
    for name, weight in before.state_dict().items():
        moved = not torch.equal(weight, after.state_dict()[name])
        assert moved == name.startswith("multi_modal_projector."), name


def test_other_models_are_refused(llama: Path, place: Path, tmp_path: Path) -> None:
    for vision, language, message in (
        (place / "clip", place / "qwen2_vl", "text_config.model_type: expected llama"),
        (llama, llama, "vision, language: expected a CLIP and a LLaMA"),
        (place / "clip", place / "clip", "text_config.model_type: expected llama, got 'clip'"),
    ):
        with pytest.raises(ValueError, match=message):
            assemble(vision, language, tmp_path / "out")
    assert not (tmp_path / "out").exists()
