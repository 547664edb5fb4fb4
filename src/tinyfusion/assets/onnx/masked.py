"""Draw images with condition.onnx and head.onnx, by numpy and onnxruntime alone: python sample.py --labels 3,1,4 --out images.npy.

A masked autoregressive model (arXiv 2406.11838): in every round more tokens become known, each denoised by the head.
"""

import argparse
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault(
    "ORT_DISABLE_TELEMETRY", "1"
)  # else it writes an id into the home folder, and may report to its maker
import onnxruntime  # noqa: E402

HERE = Path(__file__).resolve().parent
FACTS = json.loads((HERE / "sampler.json").read_text(encoding="utf-8"))
USUAL = FACTS["recommended"]


def session(name: str) -> Any:
    """A graph of this folder, ready to run."""
    return onnxruntime.InferenceSession(HERE / name, providers=["CPUExecutionProvider"])


def denoised(head: Any, condition: Any, scale: float, noise: Any) -> Any:
    """Tokens (N, E) by ancestral steps of the head. noise (steps, N, E); condition (N, W) or, guided, (2N, W): the null half last."""
    num_steps, size, x = len(noise), noise.shape[2], noise[0]
    steps = [round(i * 999 / max(num_steps - 1, 1)) for i in range(num_steps)]
    bars = [1.0, *(FACTS["alphas_cumprod"][t] for t in steps)]
    for i in reversed(range(num_steps)):
        before, after = bars[i + 1], bars[i]
        rows = np.concatenate([x] * (len(condition) // len(x)))
        times = np.full(len(rows), steps[i], np.float32)
        output = head.run(None, {"x": rows, "t": times, "condition": condition})[0]
        predicted, share = output[: len(x), :size], (output[: len(x), size:] + 1) / 2
        if len(rows) > len(x):
            null = output[len(x) :, :size]
            predicted = null + scale * (predicted - null)
        clean = (x - math.sqrt(1 - before) * predicted) / math.sqrt(before)
        clean = np.clip(clean, -1, 1) if USUAL["clip"] else clean
        beta = 1 - before / after
        x = (beta * math.sqrt(after) * clean + (1 - after) * math.sqrt(1 - beta) * x) / (1 - before)
        if i > 0:  # learned variance: between that of the posterior and beta, in logarithms
            low = math.log(beta * (1 - after) / (1 - before))
            x = (
                x
                + USUAL["temperature"] * np.exp((share * math.log(beta) + (1 - share) * low) / 2) * noise[num_steps - i]
            )
        x = x.astype(np.float32)
    return x


def draw(y: Any, order: Any, noise: Callable[[int, Any], Any], rounds: int, guidance: float) -> Any:
    """Images (B, C, S, S). order (B, L): tokens are revealed from its end. noise: (round, shape) -> standard normal."""
    graph, head, places, size = (
        session("condition.onnx"),
        session("head.onnx"),
        FACTS["num_tokens"],
        FACTS["token_features"],
    )
    tokens, hidden = np.zeros((len(y), places, size), np.float32), places
    for round_ in range(rounds):
        planned = math.floor(places * math.cos(math.pi / 2 * (round_ + 1) / rounds))
        after = max(1, min(hidden - 1, planned)) if round_ < rounds - 1 else 0
        inputs = {"tokens": tokens, "y": y, "known": np.sort(order[:, hidden:], axis=1), "hidden": order[:, :hidden]}
        if guidance > 1:
            inputs = {name: np.concatenate([value, value]) for name, value in inputs.items()}
            inputs["y"][len(y) :] = FACTS["null_label"]
        chosen = np.arange(len(y))[:, None], order[:, after:hidden]
        both = graph.run(None, inputs)[0].reshape(-1, len(y), places, FACTS["condition_features"])
        condition = both[:, *chosen].reshape(-1, both.shape[-1])
        grows = (places - after) / places if USUAL["guidance_schedule"] == "linear" else 1
        values = noise(round_, (USUAL["head_steps"], hidden - after, size)).swapaxes(0, 1)
        revealed = denoised(head, condition, 1 + (guidance - 1) * grows, values.reshape(len(values), -1, size))
        tokens[chosen] = revealed.reshape(len(y), -1, size)
        hidden = after
    side, patch = math.isqrt(places), FACTS["patch_size"]
    cells = tokens.reshape(len(y), side, side, -1, patch, patch).transpose(0, 3, 1, 4, 2, 5)
    return cells.reshape(len(y), -1, side * patch, side * patch)


def main() -> None:
    """Read the options, draw, and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--labels", required=True, help="class of every image, such as 3,1,4")
    parser.add_argument("--out", required=True, type=Path, help=".npy (B, C, H, W) as the model draws")
    parser.add_argument("--num-steps", type=int, default=USUAL["num_steps"], help="rounds")
    parser.add_argument("--guidance", type=float, default=USUAL["guidance"])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    y = np.array([int(label) for label in options.labels.split(",")], np.int64)
    generator = np.random.default_rng(options.seed)
    order = generator.random((len(y), FACTS["num_tokens"])).argsort(axis=1)
    images = draw(
        y,
        order,
        lambda _, shape: generator.standard_normal((len(y), *shape), np.float32),
        options.num_steps,
        options.guidance,
    )
    np.save(options.out, images)


if __name__ == "__main__":
    main()
