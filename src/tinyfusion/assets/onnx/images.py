"""Draw images with model.onnx, by numpy and onnxruntime alone: python sample.py --labels 3,1,4 --out images.png.

sampler.json says the process: Gaussian models are drawn by DDIM (arXiv 2010.02502), flows by Heun's method or Euler's.
"""

import argparse
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault(
    "ORT_DISABLE_TELEMETRY", "1"
)  # else it writes an id into the home folder, and may report to its maker
import onnxruntime  # noqa: E402

HERE = Path(__file__).resolve().parent
FACTS = json.loads((HERE / "sampler.json").read_text(encoding="utf-8"))


def condition(labels: Any) -> dict[str, Any]:
    """What the graph gets for labels: classes, or rows of the model's texts."""
    if not (HERE / "texts.npz").exists():
        return {"y": labels}
    with np.load(HERE / "texts.npz") as texts:
        return {name: texts[name][labels] for name in texts}


def model(session: Any, x: Any, t: float, labels: Any, guidance: float) -> Any:
    """The output under classifier-free guidance (arXiv 2207.12598) on the first `guided_channels` channels."""
    num, times = len(x), np.full(2 * len(x), t, np.float32)
    if FACTS["guided"]:
        given = {"x": x, "t": times[:num], **condition(labels), "guidance": np.array([guidance], np.float32)}
        return session.run(None, given)[0]
    if guidance == 1:
        return session.run(None, {"x": x, "t": times[:num], **condition(labels)})[0]
    both = np.append(labels, np.full(num, FACTS["null_label"]))
    output, without = np.split(session.run(None, {"x": np.append(x, x, axis=0), "t": times, **condition(both)})[0], 2)
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
    times = np.linspace(FACTS["times"][0], FACTS["times"][1], num_points, dtype=np.float32)
    for t, size in zip(times, np.diff(times), strict=False):
        slope = network(x, t)
        if FACTS["recommended"]["method"] == "heun2":
            slope = (slope + network(x + size * slope, t + size)) / 2
        x = x + size * slope
    return x


def few_steps(network: Any, x: Any, num_steps: int, seed: int) -> Any:
    """The steps that the model was distilled for, with fresh noise where they have any."""
    if num_steps != len(FACTS["few_steps"]):
        raise SystemExit(f"the model draws in {len(FACTS['few_steps'])} steps; got {num_steps}")
    random = np.random.default_rng([seed, 1])
    for step in FACTS["few_steps"]:
        x = step["x"] * x + step["out"] * network(x, step["t"])[:, : x.shape[1]]
        x = (x + step["noise"] * random.standard_normal(x.shape, np.float32)).astype(np.float32)
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
    parser.add_argument("--labels", required=True, help="class (or number of the text) of every image, such as 3,1,4")
    parser.add_argument(
        "--out", required=True, type=Path, help=".png (models of pixels), or .npy (B, C, H, W) as the model draws"
    )
    parser.add_argument("--num-steps", type=int, default=default["num_steps"], help="steps; of a flow points in time")
    parser.add_argument("--guidance", type=float, default=default["guidance"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--noise", type=Path, help=".npy (B, C, H, W) float32 to begin with, instead of a seed")
    options = parser.parse_args()
    labels = np.array([int(label) for label in options.labels.split(",")], np.int64)
    shape = (len(labels), *FACTS["input_shape"])
    x = (
        np.load(options.noise)
        if options.noise
        else np.random.default_rng(options.seed).standard_normal(shape, np.float32)
    )
    session = onnxruntime.InferenceSession(HERE / "model.onnx", providers=["CPUExecutionProvider"])

    def network(x: Any, t: float) -> Any:
        return model(session, x, t, labels, options.guidance)

    if "folded_guidance" in FACTS and options.guidance != 1:
        raise SystemExit("the model has its guidance folded in: leave out --guidance")
    if "few_steps" in FACTS:
        images = few_steps(network, x, options.num_steps, options.seed)
    else:
        images = {"gaussian": gaussian, "flow": flow}[FACTS["process"]](network, x, options.num_steps)
    if options.out.suffix == ".png":
        options.out.write_bytes(png(images))
    else:
        np.save(options.out, images)


if __name__ == "__main__":
    main()
