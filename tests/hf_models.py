"""Tiny random models of transformers, and a batch for each."""

from typing import Any

import torch
import transformers

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
VISION = {
    **{k: v for k, v in SIZES.items() if k != "vocab_size"},
    **{"image_size": 32, "patch_size": 8},
}
IDS = torch.arange(1, 25).reshape(2, 12)
LEFT = torch.tensor([[1] * 12, [0] * 5 + [1] * 7])


def llama() -> Any:
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config)


def mistral() -> Any:
    config = transformers.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4)
    return transformers.MistralForCausalLM(config)


def qwen2() -> Any:
    config = transformers.Qwen2Config(**SIZES, num_key_value_heads=2)
    return transformers.Qwen2ForCausalLM(config)


def vit() -> Any:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**VISION, num_labels=5))


def clip() -> Any:
    text = {**SIZES, "eos_token_id": 24}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=VISION))


def siglip() -> Any:
    config = transformers.SiglipConfig(text_config=SIZES, vision_config=VISION)
    return transformers.SiglipModel(config)


def llava() -> Any:
    text = {**SIZES, "model_type": "llama"}
    vision = {**VISION, "model_type": "clip_vision_model"}
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=95)
    return transformers.LlavaForConditionalGeneration(config)


def blip_2() -> Any:
    text = {"hidden_size": 64, "ffn_dim": 64, "word_embed_proj_dim": 64, "num_hidden_layers": 2}
    text |= {"vocab_size": 96, "num_attention_heads": 4, "model_type": "opt", "dropout": 0.0}
    qformer = {**SIZES, "encoder_hidden_size": 64, "num_hidden_layers": 3}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.Blip2Config(
        vision_config=VISION,
        qformer_config={**qformer, **dropout},
        text_config=text,
        num_query_tokens=16,
        image_token_index=95,
    )
    return transformers.Blip2ForConditionalGeneration(config)


def qwen2_5_vl() -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    vision = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "depth": 2}
    vision |= {"num_heads": 2, "window_size": 16, "fullatt_block_indexes": [1], "patch_size": 4}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**SIZES, "num_key_value_heads": 2, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=95,
        video_token_id=94,
        vision_start_token_id=93,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen2_vl() -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    vision = {"embed_dim": 32, "hidden_size": 64, "depth": 1, "num_heads": 2}
    config = transformers.Qwen2VLConfig(
        text_config={**SIZES, "num_key_value_heads": 2, "rope_parameters": rope},
        vision_config={**vision, "patch_size": 4},
        image_token_id=95,
        video_token_id=94,
        vision_start_token_id=93,
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


WORDS = {"input_ids": IDS, "attention_mask": LEFT, "labels": IDS.masked_fill(LEFT == 0, -100)}
PAIRS = {"input_ids": IDS, "pixel_values": pixels(), "return_loss": True}
SEEN = {
    "input_ids": torch.cat([torch.full((2, 16), 95), IDS], dim=1),
    "labels": torch.cat([torch.full((2, 16), -100), IDS], dim=1),
    "pixel_values": pixels(),
}
GRIDS = torch.tensor([[1, 4, 4], [1, 2, 6]])  # images of two sizes, one in each row
RAGGED = {
    "input_ids": torch.tensor([[93, 95, 95, 95, 95, 5, 6], [0, 93, 95, 95, 95, 7, 8]]),
    "attention_mask": torch.tensor([[1] * 7, [0] + [1] * 6]),
    "labels": torch.tensor([[-100] * 5 + [5, 6], [-100] * 5 + [7, 8]]),
    "mm_token_type_ids": torch.tensor([[0, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0, 0]]),
    "pixel_values": torch.randn(28, 96, generator=torch.Generator().manual_seed(0)),
    "image_grid_thw": GRIDS,
}
LABELLED = {"pixel_values": pixels(), "labels": torch.tensor([1, 4])}
PACKED = {
    "input_ids": IDS[:1],
    "labels": IDS[:1],
    "position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]]),
    "use_cache": False,
}
