"""Write videos as frames, and as mp4 where the program ffmpeg is there.

Shapes: N videos of F frames, (N, F, H, W, 3) uint8.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from tinyfusion.core.files import atomic_write
from tinyfusion.data.image_source import ImageSource

_OURS = r"[0-9]{6,}\.mp4|[0-9]{6,}/[0-9]{4,}\.png"


def write_video_folder(folder: Path, videos: ImageSource, frames_per_second: int) -> None:
    """Write the frames of video i as 00000i/0000.png and so on, and 00000i.mp4 where ffmpeg is on PATH, the whole folder at once.

    An ffmpeg that fails is reported on stderr once, and the frames are written all the same.
    """
    program, failed = shutil.which("ffmpeg"), ""
    with atomic_write(folder, _OURS) as temporary:
        temporary.mkdir()
        for index, video in enumerate(video for batch in videos.read(1) for video in batch):
            frames = temporary / f"{index:06d}"
            frames.mkdir()
            for number, frame in enumerate(video):
                Image.fromarray(frame).save(frames / f"{number:04d}.png", compress_level=1)
            if program and not failed:
                failed = _joined(program, frames, video, frames_per_second)
    if not program:
        print(f"{folder}: frames alone, because ffmpeg, which makes an mp4 of them, is not on PATH", file=sys.stderr)
    elif failed:
        print(f"{folder}: frames alone, because ffmpeg failed: {failed}", file=sys.stderr)


def _joined(program: str, frames: Path, video: np.ndarray, frames_per_second: int) -> str:
    """Write the mp4 next to a folder of frames. Returns what went wrong; empty where nothing did."""
    even = "scale=trunc(iw/2)*2:trunc(ih/2)*2"  # yuv420p has no odd sides
    made = frames.with_suffix(".mp4")
    command = [
        program, "-y", "-loglevel", "error", "-framerate", str(frames_per_second), "-i", str(frames / "%04d.png"),
        "-vf", even, "-c:v", "libx264", "-pix_fmt", "yuv420p", "-frames:v", str(len(video)), str(made),
    ]  # fmt: skip
    try:
        ran = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    except OSError as error:
        return str(error.strerror or error)
    if ran.returncode == 0 and made.is_file():
        return ""
    made.unlink(missing_ok=True)
    return " ".join(ran.stderr.split())[-200:] or f"exit code {ran.returncode}"
