"""Videos as lists of frames: what may be given as one, and which of its frames are taken."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

FRAME_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
FPS, MIN_FRAMES, MAX_FRAMES, FRAME_FACTOR = 2.0, 4, 768, 2  # as in qwen-vl-utils


def choose_frames(
    videos: Sequence[Any], video_fps: float | Sequence[float] | None
) -> list[tuple[Any, float]]:
    """Each video's frames at about two a second, and how many a second they then are."""
    if video_fps is None:
        return [(video, FPS) for video in videos]
    rates = [video_fps] * len(videos) if isinstance(video_fps, (int, float)) else [*video_fps]
    if len(rates) != len(videos) or not all(rate > 0 for rate in rates):
        raise ValueError(
            f"video_fps: expected a positive number for each of {len(videos)} videos, got {rates}"
        )
    chosen = []
    for video, rate in zip(videos, rates, strict=True):
        frames = list(frames_of(video))
        indices = frame_indices(len(frames), rate)
        fps = rate * len(indices) / max(len(frames), 1)
        chosen.append(([frames[i] for i in indices], fps))
    return chosen


def frame_indices(num_frames: int, video_fps: float) -> list[int]:
    """Indices of the frames to take from a video, evenly spread (qwen-vl-utils' smart_nframes)."""
    if num_frames <= FRAME_FACTOR:
        return list(range(num_frames))
    most = min(MAX_FRAMES, num_frames) // FRAME_FACTOR * FRAME_FACTOR
    wanted = min(max(num_frames / video_fps * FPS, min(MIN_FRAMES, most)), most)
    count = int(wanted) // FRAME_FACTOR * FRAME_FACTOR
    indices = torch.linspace(0, num_frames - 1, count).round().long()
    return [int(i) for i in indices]


def as_videos(videos: Any) -> list[Any]:
    """One video or a list of them as a list; a list of frames is one video."""
    if videos is None:
        return []
    if not isinstance(videos, (list, tuple)):
        return [videos]
    first = videos[0] if videos else None
    is_frame = isinstance(first, Image.Image) or getattr(first, "ndim", 0) in (2, 3)
    return [videos] if is_frame else list(videos)


def frames_of(video: Any) -> Iterable[Any]:
    """The frames of a list, an array or a directory of image files."""
    if not isinstance(video, (str, Path)):
        return video  # type: ignore[no-any-return]
    if not Path(video).is_dir():
        raise ValueError(f"video {video}: expected a directory of frames, found none")
    frames = [p for p in Path(video).iterdir() if p.suffix.lower() in FRAME_SUFFIXES]
    return sorted(frames, key=lambda path: _natural(path.name))


def _natural(name: str) -> tuple[list[str | int], str]:
    """Sorts 2 before 10; names that differ in leading zeros only, as text."""
    parts = re.split(r"(\d+)", name)  # text and digits in turn
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name
