"""Video clips: folders of frames, animations, and video files where a library that decodes them is installed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tinyfusion.config.recipe import Orientation
from tinyfusion.core.errors import UserError
from tinyfusion.core.reading import unreadable
from tinyfusion.data.originals import read_file
from tinyfusion.data.picture import (
    MOST_PIXELS,
    SUFFIXES,
    Picture,
    Size,
    centre_crop,
    check_frames,
    decode,
    decode_frames,
    size_of,
)

MOVING = (".gif", ".webp")  # animations, read by Pillow
VIDEOS = (".mp4", ".webm", ".mov", ".mkv", ".avi")
FRAMES = tuple(suffix for suffix in SUFFIXES if suffix not in MOVING)  # of single frames in a folder


def clips_below(path: Path) -> list[str]:
    """Videos, animations, and folders of frames below a folder, sorted by name. Frames in `path` itself are of no clip."""
    clips: list[str] = []

    def refused(error: OSError) -> None:
        raise unreadable(Path(error.filename or path), error) from error

    for folder, folders, names in os.walk(path, onerror=refused):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        shown = [name for name in names if not name.startswith(".")]
        clips += [os.path.join(folder, name) for name in shown if name.lower().endswith((*MOVING, *VIDEOS))]
        if folder != str(path) and any(name.lower().endswith(FRAMES) for name in shown):
            clips.append(folder)
    return sorted(clips)


def read_clip(content: Any, where: str, size: Size, orientation: Orientation, frames: int) -> Picture:
    """The first `frames` frames of a clip, each as of `decode` in colour: pixels (F, H, W, 3).

    content: bytes of an animation or of a picture, which is one frame; the path of a folder of frames or of a video. Raises
    UserError on damaged and on shorter clips.
    """
    if isinstance(content, Path) and content.is_dir():
        files = _frames_in(content)
        check_frames(len(files), frames, where)
        each = [decode(read_file(file), str(file), size, orientation) for file in files[:frames]]
        changes = tuple(dict.fromkeys(change for picture in each for change in picture.changes))
        return Picture(np.stack([picture.in_colour for picture in each]), changes)
    if isinstance(content, Path):
        pixels = [
            _cropped(frame, size, where) for _, frame in zip(range(frames), _decoded_video(content), strict=False)
        ]
        check_frames(len(pixels), frames, where)
        return Picture(np.stack(pixels))
    if where.lower().endswith(MOVING):
        return decode_frames(content, where, size, frames)
    check_frames(1, frames, where)
    picture = decode(content, where, size, orientation)
    return Picture(picture.in_colour[None], picture.changes)


def clip_size(content: Any, where: str, orientation: Orientation) -> tuple[int, int]:
    """(height, width) of the first frame of a clip; errors as of `read_clip`."""
    if isinstance(content, Path) and content.is_dir():
        first = _frames_in(content)[0]
        return size_of(read_file(first), str(first), orientation)
    if isinstance(content, Path) and content.suffix.lower() in VIDEOS:
        for frame in _decoded_video(content):
            return frame.shape[0], frame.shape[1]
        check_frames(0, 1, where)
    return size_of(content, where, orientation)


def _frames_in(folder: Path) -> list[Path]:
    """The frames of a folder; numbers in their names sort as numbers."""
    try:
        names = [name for name in os.listdir(folder) if name.lower().endswith(FRAMES) and name[0] != "."]
    except OSError as error:
        raise unreadable(folder, error) from error
    parts = {name: [int(each) if each.isdigit() else each for each in re.split(r"(\d+)", name)] for name in names}
    if not names:
        raise UserError(f"{folder} holds no frames: wanted pictures ({', '.join(FRAMES)})")
    return [folder / name for name in sorted(names, key=lambda name: (parts[name], name))]


def _cropped(frame: np.ndarray, size: Size, where: str) -> np.ndarray:
    if frame.shape[0] * frame.shape[1] > MOST_PIXELS:
        raise UserError(
            f"{where} has frames of {frame.shape[1]} x {frame.shape[0]}: wanted at most {MOST_PIXELS:,} pixels"
        )
    wanted = (size, size) if isinstance(size, int) else size
    return frame if frame.shape[:2] == wanted else np.array(centre_crop(Image.fromarray(frame), size))


def _decoded_video(path: Path) -> Iterator[np.ndarray]:
    """(H, W, 3) uint8: the frames of a video file. Raises UserError where no library decodes it, and where it is damaged."""
    read = _with_av if find_spec("av") else _with_imageio if find_spec("imageio") else None
    if read is None:
        advice = "install av (pip install av), or unpack it to a folder of frames"
        raise UserError(f"{path}: nothing is installed that decodes videos: {advice}")
    try:
        yield from read(path)
    except UserError:
        raise
    except Exception as error:  # of the libraries, which raise many kinds on damaged files
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} cannot be decoded as a video: {reason}") from error


def _with_av(path: Path) -> Iterator[np.ndarray]:
    import av

    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="rgb24")


def _with_imageio(path: Path) -> Iterator[np.ndarray]:
    import imageio

    with imageio.get_reader(str(path)) as reader:
        for frame in reader:
            yield np.asarray(frame)[..., :3]
