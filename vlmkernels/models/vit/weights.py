"""ViT's checkpoints. The model's own names are those of the published classifiers."""

from __future__ import annotations

# Newer transformers renames in memory -> what every published file says.
_IN_MEMORY = (
    ("vit.layers.", "vit.encoder.layer."),
    (".attention.q_proj.", ".attention.attention.query."),
    (".attention.k_proj.", ".attention.attention.key."),
    (".attention.v_proj.", ".attention.attention.value."),
    (".attention.o_proj.", ".attention.output.dense."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
)


def own_name(stored: str) -> str:
    """`encoder.*` of a file without a head -> `vit.encoder.*`; in-memory names -> published."""
    name = stored if stored.startswith(("vit.", "classifier.")) else f"vit.{stored}"
    for theirs, published in _IN_MEMORY:
        name = name.replace(theirs, published)
    return name


def published_name(own: str, bare: bool) -> str:
    """bare: the file of an encoder alone, without `vit.`."""
    return own.removeprefix("vit.") if bare else own
