"""Shapes of published vision-language models, under one name each: for benches and tests.

A `Shape` is one transformer stack (a vision tower, a Q-Former or a language model) as published;
`num_tokens` is what one image gives, or a prompt of common length.
"""

from dataclasses import dataclass

_VIT = "arXiv 2010.11929, table 1"
_CLIP = "arXiv 2103.00020; hub openai/clip-vit-large-patch14-336 config.json"
_OPEN_CLIP = "open_clip model_configs/ViT-bigG-14.json; at 448 in Qwen-VL, arXiv 2308.12966"
_BLIP2 = "arXiv 2301.12597, section 3; LAVIS configs"
_SIGLIP = "arXiv 2303.15343, 2305.13035; hub google/siglip-so400m-patch14-384 config.json"
_QWEN2_VL = "arXiv 2409.12191; hub Qwen/Qwen2-VL-*-Instruct config.json"
_QWEN25_VL = "arXiv 2502.13923; hub Qwen/Qwen2.5-VL-*-Instruct config.json"
_QWEN3_VL = "arXiv 2505.09388; hub Qwen/Qwen3-VL-*-Instruct config.json"
_LLAVA = "arXiv 2310.03744; LLaMA-2, arXiv 2307.09288"


@dataclass(frozen=True)
class Shape:
    """Sizes of one transformer stack. Names are those of the code: see CONTRIBUTING."""

    name: str
    num_tokens: int
    hidden_dim: int
    mlp_dim: int
    num_heads: int
    num_heads_k: int
    head_dim: int
    causal: bool
    norm: str  # "rms_norm" | "layer_norm"
    patch: tuple[int, ...]  # channels, (frames,) height, width; () where no patches come in
    source: str

    @property
    def is_vision(self) -> bool:
        return bool(self.patch)


def _tower(
    name: str, num_tokens: int, dims: tuple[int, int, int], patch: tuple[int, ...], source: str
) -> Shape:
    hidden, mlp, heads = dims
    norm = "rms_norm" if name.startswith("qwen25") else "layer_norm"
    sizes = (num_tokens, hidden, mlp, heads, heads, hidden // heads)
    return Shape(name, *sizes, causal=False, norm=norm, patch=patch, source=source)


def _language(name: str, dims: tuple[int, int, int, int, int], source: str) -> Shape:
    hidden, mlp, heads, heads_k, head_dim = dims
    sizes = (4096, hidden, mlp, heads, heads_k, head_dim)
    return Shape(name, *sizes, causal=True, norm="rms_norm", patch=(), source=source)


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        # Vision towers: (hidden_dim, mlp_dim, num_heads); tokens of one image, CLS included.
        _tower("vit_b_16_224", 197, (768, 3072, 12), (3, 16, 16), _VIT),
        _tower("vit_l_16_224", 197, (1024, 4096, 16), (3, 16, 16), _VIT),
        _tower("vit_h_14_224", 257, (1280, 5120, 16), (3, 14, 14), _VIT),
        _tower("vit_l_14_336", 577, (1024, 4096, 16), (3, 14, 14), _CLIP),
        _tower("vit_bigg_14_448", 1024, (1664, 8192, 16), (3, 14, 14), _OPEN_CLIP),
        _tower("vit_g_14_224", 257, (1408, 6144, 16), (3, 14, 14), _BLIP2),
        _tower("siglip_so400m_14_384", 729, (1152, 4304, 16), (3, 14, 14), _SIGLIP),
        # 4096 patches: a picture of 896 x 896; each image is one packed sequence.
        _tower("qwen2vl_vision", 4096, (1280, 5120, 16), (3, 2, 14, 14), _QWEN2_VL),
        _tower("qwen25vl_vision", 4096, (1280, 3420, 16), (3, 2, 14, 14), _QWEN25_VL),
        # Language models: (hidden_dim, mlp_dim, num_heads, num_heads_k, head_dim).
        _language("qwen2vl_2b", (1536, 8960, 12, 2, 128), _QWEN2_VL),
        _language("qwen2vl_7b", (3584, 18944, 28, 4, 128), _QWEN2_VL),
        _language("qwen2vl_72b", (8192, 29568, 64, 8, 128), _QWEN2_VL),
        _language("qwen25vl_3b", (2048, 11008, 16, 2, 128), _QWEN25_VL),
        _language("qwen3vl_2b", (2048, 6144, 16, 8, 128), _QWEN3_VL),
        _language("qwen3vl_8b", (4096, 12288, 32, 8, 128), _QWEN3_VL),
        _language("llava15_7b", (4096, 11008, 32, 32, 128), _LLAVA),
        _language("llava15_13b", (5120, 13824, 40, 40, 128), _LLAVA),
    )
}

# Codebooks: name -> (num_codes, dim, metric). Sources: VQGAN f16, arXiv 2012.09841; ViT-VQGAN,
# arXiv 2110.04627; LlamaGen, arXiv 2406.06525; LWM's VQGAN has 8192 codes too, arXiv 2402.08268.
CODEBOOKS = {
    "vqgan_f16": (1024, 256, "euclidean"),
    "vit_vqgan": (8192, 64, "euclidean"),
    "vqgan_8192": (8192, 256, "euclidean"),
    "llamagen": (16384, 8, "cosine"),
}


def shape(name: str) -> Shape:
    """The shape of that name. Raises ValueError that lists the names."""
    if name not in SHAPES:
        raise ValueError(f"shape: expected one of {', '.join(SHAPES)}, got {name!r}")
    return SHAPES[name]
