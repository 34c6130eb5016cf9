"""Checkpoint directories in the Hugging Face layout: config.json and (sharded) safetensors; those
with PyTorch's .bin files instead are read as well.

Reading goes shard by shard into a model built on the meta device, so a checkpoint never takes
twice its memory. Everything is checked by the files' headers before a weight is touched. Writing
goes to a directory aside. A new checkpoint is then moved into place whole. Over an old one file
after file is moved, and config.json, without which nothing is loaded, leaves first and comes last:
a kill leaves the old checkpoint, an error at loading, or the new one, never a mix of both.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vlmkernels.models.bin_files import BIN_INDEX, BIN_WEIGHTS, NAMES, BinFile
from vlmkernels.models.fields import FILE_NAMES, expect

Json = dict[str, Any]

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

# What a model computes in, by torch's names and by those in a file's header. Others (integers,
# 8-bit floats that want a scale) would only fail later, or answer wrongly.
DTYPES = {name: dtype for dtype, name in NAMES.items()}


def read_json(path: Path) -> Json:
    """The JSON object in a file; ValueError naming the file when there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: expected a file, found none") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def write_json(path: Path, data: Json) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


@dataclass(frozen=True)
class Piece:
    """A model's tensor that is stored as one of `parts` equal parts of another, or transposed."""

    name: str
    part: int = 0
    parts: int = 1
    transposed: bool = False


# A stored name -> the model's, several where it is stored in one; "" where it is no weight.
Rename = Callable[[str], str | list[Piece]]


@dataclass(frozen=True)
class Stored:
    """A model's tensor as a file's header describes it."""

    file: Path
    name: str  # in the file
    shape: tuple[int, ...]
    dtype: str  # as in the header: "BF16"
    piece: Piece

    def read(self, shard: Any) -> Tensor:
        if self.piece.parts == 1:
            tensor: Tensor = shard.get_tensor(self.name)
        else:
            first = self.piece.part * self.shape[0]
            tensor = shard.get_slice(self.name)[first : first + self.shape[0]]
        return tensor.T if self.piece.transposed else tensor


def read_headers(path: Path, rename: Rename, weights: str = WEIGHTS) -> dict[str, Stored]:
    """What the weight files of a checkpoint directory hold, by the model's names."""
    stored: dict[str, Stored] = {}
    for file in _files(path, weights):
        with _open(file) as shard:
            for name in shard.keys():  # noqa: SIM118  (not a mapping)
                for piece in _pieces(rename(name)):
                    if piece.name in stored:
                        raise ValueError(f"{file}: {name} is also in {stored[piece.name].file}")
                    header = shard.get_slice(name)
                    shape = _shape(header.get_shape(), piece)
                    stored[piece.name] = Stored(file, name, shape, header.get_dtype(), piece)
    return stored


def read_tensors(path: Path, weights: str = WEIGHTS) -> Iterator[tuple[str, Tensor]]:
    """What the weight files of a checkpoint directory hold, by the names in them."""
    for file in _files(path, weights):
        with _open(file) as shard:
            for name in shard.keys():  # noqa: SIM118  (not a mapping)
                yield name, shard.get_tensor(name)


def _files(path: Path, weights: str) -> list[Path]:
    """The shards of the first index that is there, or else one file."""
    for index, single in ((INDEX, weights), (BIN_INDEX, BIN_WEIGHTS)):
        if (path / index).is_file():
            key = f"{path / index}: weight_map"
            weight_map = expect(key, read_json(path / index).get("weight_map"), FILE_NAMES)
            return [path / name for name in sorted(set(weight_map.values()))]
        if (path / single).is_file():
            return [path / single]
    return [path / weights]


def _pieces(names: str | list[Piece]) -> list[Piece]:
    if isinstance(names, str):
        return [Piece(names)] if names else []
    return names


def _shape(stored: list[int], piece: Piece) -> tuple[int, ...]:
    if piece.transposed:
        stored = stored[::-1]
    return (stored[0] // piece.parts, *stored[1:]) if piece.parts > 1 else tuple(stored)


@contextlib.contextmanager
def _open(file: Path) -> Iterator[Any]:
    if not file.is_file():
        raise ValueError(f"{file}: expected a safetensors file, found none")
    if file.suffix == ".bin":
        yield BinFile(file)
        return
    try:
        shard = safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: truncated or not a safetensors file: {error}") from error
    with shard as opened:
        yield opened


def load_weights(
    model: nn.Module,
    path: str | Path,
    *,
    rename: Rename = lambda name: name,
    weights: str = WEIGHTS,
    tied: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> None:
    """Fill every parameter and buffer of `model` (usually on the meta device) from `path`.

    Args:
        rename: a stored name -> the model's name; see `Rename`.
        weights: the file's name where there is no index of shards.
        tied: names that files may hold besides the model's, each with the model's name for the
            same tensor; the two must be equal.
        dtype: None keeps what the file has; only floating-point tensors are converted.
        device: None is the CPU.

    Raises:
        ValueError: a missing, truncated or foreign file; names that are missing or unexpected,
            shapes and dtypes that do not fit, all listed; a `dtype` that is none of DTYPES, a
            `device` that is none. The model is untouched then.
    """
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(f"dtype: expected one of {[*DTYPES.values()]}, got {dtype!r}")
    device = _device(device)
    stored = read_headers(Path(path), rename, weights)
    aliases = {a: source for a, source in (tied or {}).items() if a in stored}
    for alias, source in aliases.items():
        _check_tied(alias, source, stored)
    wanted = dict(model.state_dict(keep_vars=True))
    _check_names(Path(path), wanted, {k: v for k, v in stored.items() if k not in aliases})
    by_file: dict[Path, list[str]] = {}
    for name in wanted:
        by_file.setdefault(stored[name].file, []).append(name)
    for file, names in by_file.items():
        with _open(file) as shard:
            for name in names:
                tensor = stored[name].read(shard)
                to = dtype if tensor.is_floating_point() and dtype else tensor.dtype
                # A copy: the file behind the tensor may go away while the model lives.
                copy = torch.empty(tensor.shape, dtype=to, device=device).copy_(tensor)
                _assign(model, name, copy)


def _device(device: torch.device | str | None) -> torch.device:
    """A device that can hold weights, before they are read."""
    try:
        found = torch.device("cpu" if device is None else device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"device: expected one that is there, got {device!r} ({why})") from error
    return found


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    old = getattr(module, leaf)
    new = nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor
    setattr(module, leaf, new)


def _check_names(path: Path, wanted: Mapping[str, Tensor], stored: Mapping[str, Stored]) -> None:
    shapes = [
        f"{name}: expected {tuple(wanted[name].shape)}, got {stored[name].shape}"
        for name in sorted(wanted.keys() & stored.keys())
        if tuple(wanted[name].shape) != stored[name].shape
    ]
    dtypes = [
        f"{name}: expected one of {[*DTYPES]}, got {stored[name].dtype}"
        for name in sorted(wanted.keys() & stored.keys())
        if wanted[name].is_floating_point() and stored[name].dtype not in DTYPES
    ]
    problems = [
        f"{title}: {_listing(names)}"
        for title, names in (
            ("missing", sorted(wanted.keys() - stored.keys())),
            ("unexpected", sorted(stored.keys() - wanted.keys())),
            ("wrong shape", shapes),
            ("wrong dtype", dtypes),
        )
        if names
    ]
    if problems:
        raise ValueError(f"{path}: the weights do not fit the config. " + ". ".join(problems))


def _listing(names: list[str], limit: int = 20) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _check_tied(alias: str, source: str, stored: Mapping[str, Stored]) -> None:
    if source not in stored:
        return  # reported as missing
    tensors = []
    for name in (alias, source):
        with _open(stored[name].file) as shard:
            tensors.append(shard.get_tensor(stored[name].name))
    if not torch.equal(*tensors):
        raise ValueError(f"{alias}: the config ties it to {source}, but the file has another one")


def save_checkpoint(
    path: str | Path,
    state: Mapping[str, Tensor],
    configs: Mapping[str, Json],
    *,
    weights: str = WEIGHTS,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write tensors and JSON files (name -> content) as a checkpoint directory.

    All is first written to a directory beside `path`; a new `path` then appears in one rename, in
    an existing one file after file is replaced, and shards that no longer count are removed (the
    module's docstring tells the order). Other files in it (a tokenizer) stay, and its config.json
    when `configs` has none.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        _write_shards(staging, state, max_shard_bytes, weights)
        for name, content in configs.items():
            write_json(staging / name, content)
        staging.chmod(0o755)
        if path.exists():
            _replace_files(path, staging)
        else:
            staging.rename(path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _replace_files(path: Path, staging: Path) -> None:
    if (path / CONFIG).is_file() and not (staging / CONFIG).exists():
        shutil.copy(path / CONFIG, staging / CONFIG)
    new = [file.name for file in staging.iterdir()]
    # From here until the last line the directory is no checkpoint, and loading it says so.
    (path / CONFIG).unlink(missing_ok=True)
    for old in (path / INDEX, *path.glob("model*.safetensors")):
        if old.name not in new:
            old.unlink(missing_ok=True)
    for name in sorted(new, key=lambda name: name == CONFIG):
        os.replace(staging / name, path / name)


def _write_shards(
    directory: Path, state: Mapping[str, Tensor], max_shard_bytes: int, weights: str
) -> None:
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in state.items():
        if size and size + tensor.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards, start=1):
        file = weights if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: state[name].detach().contiguous() for name in names}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        (directory / file).chmod(0o644)  # safetensors leaves it for the owner alone
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = {"total_size": sum(t.nbytes for t in state.values())}
        write_json(directory / INDEX, {"metadata": total, "weight_map": weight_map})
