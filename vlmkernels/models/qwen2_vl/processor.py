"""Qwen2-VL processor: text, images and videos in, model arguments out; Pillow and numpy only.

Bit-equal to transformers' Pillow processor for images. Written after the published code:
https://github.com/QwenLM/Qwen2.5-VL (qwen-vl-utils) and transformers' qwen2_vl.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vlmkernels.models.chat import as_texts, grow
from vlmkernels.models.checkpoint import Json, read_json, write_json
from vlmkernels.models.fields import (
    INDEX,
    OBJECT,
    THREE_NUMBERS,
    THREE_POSITIVE,
    expect,
    expect_fields,
)
from vlmkernels.models.images import Pixels, load_rgb
from vlmkernels.models.pixels import RESAMPLE, PixelTable, as_list, resize
from vlmkernels.models.supervised import TemplateProcessor
from vlmkernels.models.tokenizer import Tokenizer

from .video import as_videos, choose_frames, frames_of

Grid = tuple[int, int, int]
Rows = NDArray[np.float32]

IMAGE_TOKEN, VIDEO_TOKEN = "<|image_pad|>", "<|video_pad|>"
VIDEO_TOKEN_BUDGET = 115_200  # 90 % of 128,000, what qwen-vl-utils leaves to one video


def smart_resize(
    height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Nearest (height, width) of multiples of `factor` with min_pixels <= area <= max_pixels.

    The aspect ratio is kept as well as the multiples allow; beyond 200 : 1 it is a ValueError.
    """
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"image: expected an aspect ratio of at most 200, got {width} x {height}")
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / beta / factor) * factor)
        new_width = max(factor, math.floor(width / beta / factor) * factor)
    elif new_height * new_width < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * beta / factor) * factor
        new_width = math.ceil(width * beta / factor) * factor
    return new_height, new_width


@dataclass
class PixelSettings(PixelTable):
    """How pixels become patch rows. Reads and writes preprocessor_config.json.

    Raises ValueError for a field of another type or range than its own.
    """

    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    do_resize: bool = True
    resample: int = int(Image.Resampling.BICUBIC)
    raw: Json = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        expect_fields(
            self,
            min_pixels=INDEX,
            resample=RESAMPLE,
            image_mean=THREE_NUMBERS,
            image_std=THREE_POSITIVE,
        )

    @classmethod
    def from_dict(cls, raw: Json, **defaults: Any) -> PixelSettings:
        names = {f.name for f in dataclasses.fields(cls)} - {"raw"}
        known = defaults | {k: v for k, v in raw.items() if k in names and v is not None}
        size = expect("size", raw.get("size") or {}, OBJECT)
        for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            if raw.get(name) is None and (size.get(edge) or size.get(name)):
                known[name] = size.get(edge) or size[name]
        return cls(**known, raw=raw)

    def to_dict(self) -> Json:
        out = self.raw | dataclasses.asdict(self)
        out.pop("raw")
        size = {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels}
        out |= {"size": size, "image_mean": [*self.image_mean], "image_std": [*self.image_std]}
        return out

    @property
    def factor(self) -> int:
        return self.patch_size * self.merge_size

    def target_size(self, image: Pixels, max_pixels: int | None = None) -> tuple[int, int]:
        height, width = image.shape[:2]
        if self.do_resize:
            low, high = self.min_pixels, max_pixels or self.max_pixels
            return smart_resize(height, width, factor=self.factor, min_pixels=low, max_pixels=high)
        if height % self.factor or width % self.factor:
            raise ValueError(f"image: expected multiples of {self.factor}, got {width} x {height}")
        return height, width

    def patchify(self, frames: Sequence[Pixels], size: tuple[int, int]) -> tuple[Rows, Grid]:
        """Frames (height, width, 3) uint8 -> rows (num_patches, 3 * frames * patch * patch), grid.

        Rows go block by block: the merge_size^2 patches that the merger joins are neighbours. The
        last frame is repeated up to a multiple of temporal_patch_size.
        """
        video = np.stack([resize(frame, size, self.resample) for frame in frames])
        short = -len(video) % self.temporal_patch_size
        video = np.concatenate([video, np.repeat(video[-1:], short, axis=0)])
        t, p, m = self.temporal_patch_size, self.patch_size, self.merge_size
        grid = (len(video) // t, size[0] // p, size[1] // p)
        patches = video.reshape(grid[0], t, grid[1] // m, m, p, grid[2] // m, m, p, 3)
        patches = patches.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
        table, rows = self.table(), np.empty(patches.shape, dtype=np.float32)
        for channel in range(3):
            rows[:, :, :, :, :, channel] = table[channel][patches[:, :, :, :, :, channel]]
        return rows.reshape(math.prod(grid), -1), grid


class Qwen2VLProcessor(TemplateProcessor):
    """Turns text with <|image_pad|> and <|video_pad|> and the pictures for them into tensors."""

    processor_class: ClassVar[str] = "Qwen2VLProcessor"
    gives_seconds: ClassVar[bool] = False
    adds_special_tokens = False

    def __init__(
        self,
        tokenizer: Tokenizer,
        image: PixelSettings | None = None,
        video: PixelSettings | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.image = image or PixelSettings()
        self.video = video or video_settings(self.image)
        self.image_token_id = tokenizer.token_to_id(IMAGE_TOKEN)
        self.video_token_id = tokenizer.token_to_id(VIDEO_TOKEN)

    @property
    def feature_ids(self) -> tuple[int, ...]:
        return (self.image_token_id, self.video_token_id)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Self:
        """From a checkpoint directory, in the published layout or the newer one-file layout."""
        path = Path(path)
        image: Json = {}
        video: Json = {}
        if (path / "processor_config.json").is_file():
            both = read_json(path / "processor_config.json")
            image, video = (
                expect(key, both.get(key) or {}, OBJECT)
                for key in ("image_processor", "video_processor")
            )
        if (path / "preprocessor_config.json").is_file():
            image = read_json(path / "preprocessor_config.json")
        if (path / "video_preprocessor_config.json").is_file():
            video = read_json(path / "video_preprocessor_config.json")
        settings = PixelSettings.from_dict(image)
        return cls(Tokenizer.from_pretrained(path), settings, video_settings(settings, video))

    def save_pretrained(self, path: str | Path) -> None:
        """Write the tokenizer's files and the two preprocessor configs."""
        path = Path(path)
        self.tokenizer.save_pretrained(path)
        image = {"image_processor_type": "Qwen2VLImageProcessor"} | self.image.to_dict()
        video = {"video_processor_type": "Qwen2VLVideoProcessor"} | self.video.to_dict()
        kind = {"processor_class": self.processor_class}
        write_json(path / "preprocessor_config.json", image | kind)
        write_json(path / "video_preprocessor_config.json", video | kind)

    def __call__(
        self,
        text: str | Sequence[str],
        images: Any = None,
        videos: Any = None,
        *,
        video_fps: float | Sequence[float] | None = None,
        padding_side: str | None = None,
        max_total_pixels: int | None = None,
    ) -> dict[str, Tensor]:
        """Model arguments for one text or a batch.

        Args:
            text: each <|image_pad|> and <|video_pad|> in it stands for one image or video, in
                order, and grows to as many tokens as that has.
            images: one or many (vlmkernels.models.images.load_rgb), for the whole batch in order.
            videos: one or many; a video is a list of frames of one size, an array (num_frames,
                height, width, 3), or a directory of image files, in the order of their names, where
                numbers count by value (2.png before 10.png).
            video_fps: frames per second of the videos given, one for all or one each; two frames of
                each second are then taken (4 to 768 in all). None: the frames are such a choice.
            padding_side: "left" or "right"; the tokenizer's by default.
            max_total_pixels: refuse more than this, counted after resizing, over all frames.

        Returns:
            input_ids, attention_mask, mm_token_type_ids (batch, seqlen) int64; with images
            pixel_values (num_patches, patch_dim) float32 and image_grid_thw (num_images, 3)
            int64; with videos pixel_values_videos and video_grid_thw.

        Raises:
            ValueError: an image that cannot be read, placeholders and pictures that do not match.
        """
        texts = as_texts(text)
        image_list, video_list = as_list(images), as_videos(videos)
        budget = _Budget(max_total_pixels)
        image_rows = [self._image(x, i, budget) for i, x in enumerate(image_list)]
        chosen = choose_frames(video_list, video_fps)
        video_rows = [self._video(x, i, budget) for i, (x, _) in enumerate(chosen)]
        counts = {
            token: [math.prod(grid) // settings.merge_size**2 for _, grid in rows]
            for token, settings, rows in (
                (IMAGE_TOKEN, self.image, image_rows),
                (VIDEO_TOKEN, self.video, video_rows),
            )
        }
        texts = grow(texts, counts)
        out = self.tokenizer.pad([self.tokenizer.encode(t) for t in texts], padding_side)
        ids = out["input_ids"]
        out["mm_token_type_ids"] = (ids == self.image_token_id) + 2 * (ids == self.video_token_id)
        for rows, pixels, grids in (
            (image_rows, "pixel_values", "image_grid_thw"),
            (video_rows, "pixel_values_videos", "video_grid_thw"),
        ):
            if rows:
                out[pixels] = torch.from_numpy(np.concatenate([r for r, _ in rows]))
                out[grids] = torch.tensor([g for _, g in rows])
        if video_rows and self.gives_seconds:
            seconds = [self.video.temporal_patch_size / fps for _, fps in chosen]
            out["second_per_grid_ts"] = torch.tensor(seconds)
        return out

    def _image(self, image: Any, index: int, budget: _Budget) -> tuple[Rows, Grid]:
        pixels = load_rgb(image, f"images[{index}]")
        size = self.image.target_size(pixels)
        budget.spend(size[0] * size[1])
        rows, grid = self.image.patchify([pixels], size)
        return rows, grid

    def _video(self, video: Any, index: int, budget: _Budget) -> tuple[Rows, Grid]:
        frames = [load_rgb(f, f"videos[{index}][{i}]") for i, f in enumerate(frames_of(video))]
        if not frames:
            raise ValueError(f"videos[{index}]: expected at least one frame, got none")
        if len({f.shape for f in frames}) > 1:
            sizes = sorted({f.shape[:2] for f in frames})
            raise ValueError(f"videos[{index}]: expected frames of one size, got {sizes}")
        size = self.video.target_size(frames[0], self._max_frame_pixels(len(frames)))
        budget.spend(size[0] * size[1] * len(frames))
        return self.video.patchify(frames, size)

    def _max_frame_pixels(self, num_frames: int) -> int:
        """A frame's even share of a video's token budget (qwen-vl-utils)."""
        v = self.video
        share = VIDEO_TOKEN_BUDGET * v.factor**2 * v.temporal_patch_size // num_frames
        return max(min(v.max_pixels, share), int(v.min_pixels * 1.05))


def video_settings(image: PixelSettings, raw: Json | None = None) -> PixelSettings:
    """Settings for frames: `raw` where it speaks, else the image's with qwen-vl-utils' sizes."""
    defaults = {f.name: getattr(image, f.name) for f in dataclasses.fields(image)}
    defaults |= {"min_pixels": 128 * image.factor**2, "max_pixels": 768 * image.factor**2}
    del defaults["raw"]
    return PixelSettings.from_dict(raw or {}, **defaults)


class _Budget:
    def __init__(self, pixels: int | None) -> None:
        self.limit, self.spent = pixels, 0

    def spend(self, pixels: int) -> None:
        self.spent += pixels
        if self.limit is not None and self.spent > self.limit:
            raise ValueError(
                f"images: expected at most max_total_pixels = {self.limit} after resizing, "
                f"got at least {self.spent}"
            )
