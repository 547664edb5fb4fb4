"""Draw images with model.onnx, by numpy and onnxruntime alone: python sample.py --labels 3,1,4 --out images.png.

sampler.json says the process: Gaussian models are drawn by DDIM (arXiv 2010.02502), flows by Heun's method or Euler's.
"""

import argparse
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

HERE = Path(__file__).resolve().parent
FACTS = json.loads((HERE / "sampler.json").read_text(encoding="utf-8"))


def model(session: Any, x: Any, t: float, y: Any, guidance: float) -> Any:
    """The output under classifier-free guidance (arXiv 2207.12598) on the first `guided_channels` channels."""
    inputs = {"x": x, "t": np.full(len(x), t, np.float32), "y": y}
    if FACTS["guided"]:
        return session.run(None, {**inputs, "guidance": np.array([guidance], np.float32)})[0]
    if guidance == 1:
        return session.run(None, inputs)[0]
    twice = {name: np.concatenate([value, value]) for name, value in inputs.items()}
    twice["y"][len(x) :] = FACTS["null_label"]
    output, without = np.split(session.run(None, twice)[0], 2)
    channels = slice(FACTS["guided_channels"])
    output[:, channels] = without[:, channels] + guidance * (output[:, channels] - without[:, channels])
    return output


def gaussian(network: Any, x: Any, num_steps: int) -> Any:
    """DDIM at the timesteps 0, s, 2s, ... below 1000, from the last one on."""
    steps = list(range(0, 1000, -(-1000 // num_steps)))
    if len(steps) != num_steps:
        raise SystemExit(f"no whole stride gives {num_steps} of 1000 steps; {len(steps)} are near")
    bars = np.array([1.0, *(FACTS["alphas_cumprod"][t] for t in steps)])
    for i in reversed(range(num_steps)):
        noise = network(x, steps[i])[:, : x.shape[1]]
        clean = (x - np.sqrt(1 - bars[i + 1]) * noise) / np.sqrt(bars[i + 1])
        x = (np.sqrt(bars[i]) * clean + np.sqrt(1 - bars[i]) * noise).astype(np.float32)
    return x


def flow(network: Any, x: Any, num_points: int) -> Any:
    """From noise at the first time to data at the last one; the output is dx/dt."""
    times = np.linspace(*FACTS["times"], num_points, dtype=np.float32)
    for t, size in zip(times, np.diff(times), strict=False):
        slope = network(x, t)
        if FACTS["recommended"]["method"] == "heun2":
            slope = (slope + network(x + size * slope, t + size)) / 2
        x = x + size * slope
    return x


def png(images: Any) -> bytes:
    """Pixels (B, C, H, W) in [-1, 1] side by side."""
    rows = np.clip(127.5 * images + 128, 0, 255).astype(np.uint8).transpose(2, 0, 3, 1)
    head = struct.pack(">IIBBBBB", rows.shape[1] * rows.shape[2], len(rows), 8, 2 * (rows.shape[3] == 3), 0, 0, 0)
    lines = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    parts = [(b"IHDR", head), (b"IDAT", lines), (b"IEND", b"")]
    named = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(named)


def main() -> None:
    """Read the options, draw, and write."""
    default = FACTS["recommended"]
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--labels", required=True, help="class of every image, such as 3,1,4")
    parser.add_argument(
        "--out", required=True, type=Path, help=".png (models of pixels), or .npy (B, C, H, W) as the model draws"
    )
    parser.add_argument("--num-steps", type=int, default=default["num_steps"], help="steps; of a flow points in time")
    parser.add_argument("--guidance", type=float, default=default["guidance"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--noise", type=Path, help=".npy (B, C, H, W) float32 to begin with, instead of a seed")
    options = parser.parse_args()
    y = np.array([int(label) for label in options.labels.split(",")], np.int64)
    shape = (len(y), *FACTS["input_shape"])
    x = (
        np.load(options.noise)
        if options.noise
        else np.random.default_rng(options.seed).standard_normal(shape, np.float32)
    )
    session = onnxruntime.InferenceSession(HERE / "model.onnx", providers=["CPUExecutionProvider"])
    draw = {"gaussian": gaussian, "flow": flow}[FACTS["process"]]
    images = draw(lambda x, t: model(session, x, t, y, options.guidance), x, options.num_steps)
    if options.out.suffix == ".png":
        options.out.write_bytes(png(images))
    else:
        np.save(options.out, images)


if __name__ == "__main__":
    main()
