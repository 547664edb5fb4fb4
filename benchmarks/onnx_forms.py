"""Compare forms of a model: processor time of a guided step, size, and FID of digits.

    python benchmarks/onnx_forms.py --part latency --shape DiT-D14/2 --json runs/onnx-d14.json
    python benchmarks/onnx_forms.py --part latency --shape DiT-XL/2 --skip int8-weights --json runs/onnx-xl.json
    python benchmarks/onnx_forms.py --part fid --json runs/onnx-fid.json
    python benchmarks/onnx_forms.py --page runs/onnx-d14.json runs/onnx-xl.json runs/onnx-fid.json --out docs/results/onnx.md

Times are processor seconds of one thread, every form in turn in one process, so that other programs disturb them less than they
disturb the clock. A step is one image with guidance, two rows of the network. Weights are random: they do not change the time.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from shared import quartiles, spread, table, xl_model
from tinyfusion.api import evaluate_images, sample_images
from tinyfusion.config.recipe import SampleSection
from tinyfusion.core.device import flush_denormals
from tinyfusion.core.rundir import write_text
from tinyfusion.data.digits import load_digits
from tinyfusion.export.onnx_folder import open_graph, save_graph
from tinyfusion.export.onnx_graph import onnx_graph
from tinyfusion.export.onnx_int8 import quantized
from tinyfusion.jobs.sampling_setup import in_dtype
from tinyfusion.models.checkpoint import LoadedModel, open_model
from tinyfusion.sample.drive import to_uint8

SHAPES = {"DiT-D14/2": 14, "DiT-XL/2": 28}  # -> blocks, of width 1152
ORDER = (
    "torch float32", "torch float32 compiled", "torch bfloat16", "torch int8", "onnxruntime float32", "onnxruntime int8-weights",
    "onnxruntime int8",
)  # fmt: skip
CPU = torch.device("cpu")
OUTSIDE = r"^(?!network\.blocks\.)"
SCORED = ("float32", "int8-weights", "int8")
IN_FLOAT = {  # layers that stay float32 in int8
    "int8 of every layer": (),
    "int8": (OUTSIDE,),
    "int8, also without modulations": (OUTSIDE, "adaLN_modulation"),
    "int8, also without attention": (OUTSIDE, r"attn\."),
    "int8, also without MLPs": (OUTSIDE, r"blocks\..*mlp\."),
    "int8, also without the first and the last block": (OUTSIDE, r"blocks\.(?:0|11)\."),
}


class Graph(nn.Module):
    """A graph in place of the network of a model, for its samplers."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.session = open_graph(path)
        self.placed = nn.Parameter(torch.zeros(1))  # says where the network is

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The output of the graph."""
        inputs = {"x": x.numpy(), "t": t.float().numpy(), "y": y.numpy()}
        return torch.from_numpy(self.session.run(["output"], inputs)[0])


def deep(blocks: int) -> LoadedModel:
    """A DiT of width 1152; its blocks have the same random weights, which is quicker to make."""
    model = xl_model(1)
    first = model.module.blocks[0]
    model.module.blocks = nn.ModuleList([first, *(copy.deepcopy(first) for _ in range(blocks - 1))])
    model.module.eval()
    return dataclasses.replace(model, arch=dataclasses.replace(model.arch, depth=blocks))


def latency(shape: str, repeats: int, skip: Sequence[str]) -> dict[str, Any]:
    """Processor seconds of every form, of every round, and sizes in bytes. skip: forms of graphs that are not timed."""
    model = deep(SHAPES[shape])
    num = sum(p.numel() for p in model.module.parameters())
    x, t, y = torch.randn(2, 4, 32, 32), torch.full((2,), 500), torch.tensor([3, 1000])
    sizes: dict[str, int] = {"torch float32": 4 * num, "torch float16 (size alone)": 2 * num}
    calls: dict[str, Callable[[], object]] = {"torch float32": lambda: model.module(x, t, y)}
    half, whole = in_dtype(model, "bfloat16", CPU), in_dtype(model, "float32", CPU, "int8")
    calls["torch bfloat16"] = lambda: half.module(x.bfloat16(), t, y)
    calls["torch int8"] = lambda: whole.module(x, t, y)
    inputs = {"x": x.numpy(), "t": t.float().numpy(), "y": y.numpy()}
    with tempfile.TemporaryDirectory() as folder:
        whole_graph = Path(folder) / "float32.onnx"
        save_graph(onnx_graph(model), whole_graph)
        for form in ("int8-weights", "int8", "float32"):  # the last one's file is removed
            path = Path(folder) / f"{form}.onnx"
            if form != "float32":
                save_graph(quantized(onnx.load_model(whole_graph), form, [OUTSIDE]), path)
            sizes[f"onnxruntime {form}"] = sum(file.stat().st_size for file in Path(folder).glob(f"{form}.onnx*"))
            print(f"{shape} {form}: {sizes[f'onnxruntime {form}']:,} bytes", flush=True)
            if form not in skip:
                session = open_graph(path)
                calls[f"onnxruntime {form}"] = lambda session=session: session.run(None, inputs)
            for file in Path(folder).glob(f"{form}.onnx*"):
                file.unlink()

        def compiled() -> Tensor:
            with model.stack.compiled():
                return model.module(x, t, y)

        calls["torch float32 compiled"] = compiled
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        with torch.inference_mode():
            for turn in range(repeats + 1):  # the first warms up
                for name, call in calls.items():
                    began = time.process_time()
                    call()
                    if turn:
                        seconds[name].append(time.process_time() - began)
                print(f"{shape} round {turn} of {repeats}", flush=True)
    return {"shape": shape, "parameters": num, "seconds": seconds, "bytes": sizes}


def fid(
    seeds: int, num_images: int, known: Mapping[str, dict[str, float]], save: Callable[[Any], None]
) -> dict[str, Any]:
    """FID of every form and seed of noise, and the error of the output of every choice of layers in float32.

    known: scores by form and seed, which are not computed again. save: called after every score.
    """
    model, settings = open_model("digits"), SampleSection(sampler="ddim", num_steps=50, guidance=1.5, batch_size=250)
    model.module.eval()
    real = load_digits()
    reference = to_uint8(torch.from_numpy(real.x))
    graph, errors, scores = onnx_graph(model), {}, {name: dict(values) for name, values in known.items()}
    noisy = torch.randn(256, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t, y = torch.arange(256) * 999 // 255, torch.arange(256) % 11
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        wanted = model.module(noisy, t, y)
        forms: dict[str, nn.Module] = {"torch float32": model.module}
        forms["torch int8"] = in_dtype(model, "float32", CPU, "int8").module
        names = {"onnxruntime float32": None, "onnxruntime int8-weights": "int8-weights"}
        for name, form in {**names, **{f"onnxruntime {name}": "int8" for name in IN_FLOAT}}.items():
            path = Path(folder) / f"{len(forms)}.onnx"
            kept = IN_FLOAT.get(name.removeprefix("onnxruntime "), (OUTSIDE,))
            save_graph(graph if form is None else quantized(copy.deepcopy(graph), form, kept), path)
            forms[name] = Graph(path)
        for name, module in forms.items():
            errors[name] = float((module(noisy, t, y) - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())
        for seed in range(seeds):
            for name in (
                name for name in forms if name.startswith("torch") or name.removeprefix("onnxruntime ") in SCORED
            ):
                if str(seed) in scores.setdefault(name, {}):
                    continue
                labels = np.arange(num_images) % 10
                drawn = sample_images(dataclasses.replace(model, module=forms[name]), labels, settings, seed=seed)
                scores[name][str(seed)] = float(evaluate_images(drawn, reference)["fid"])
                print(f"{name} seed {seed}: FID {scores[name][str(seed)]:.3f}", flush=True)
                save({"fid": scores})
    return {"fid": scores, "errors": errors}


def page(results: list[dict[str, Any]]) -> str:
    """docs/results/onnx.md."""
    lines = PAGE.strip().split("\n")
    for result in results:
        if "shape" in result:
            base = result["seconds"]["torch float32"]
            half = 2 * result["parameters"]
            lines += ["", f"## {result['shape']}, {result['parameters']:,} parameters", ""]
            rows = []
            for name in ORDER:
                seconds = result["seconds"].get(name, [])
                if not seconds:
                    continue
                ratios = [b / s for b, s in zip(base, seconds, strict=True)]
                size = result["bytes"].get(name)
                rows.append((name, quartiles(seconds, 2), quartiles(ratios, 2), *_sizes(size, half)))
            head = "form", "seconds of a step", "times as fast as torch float32", "MB", "float16 / size"
            lines += table(head, *rows)
        else:
            lines += ["", "## Digits", ""]
            plain = result["fid"]["torch float32"]
            rows = []
            for name, values in result["fid"].items():
                apart = [values[seed] - plain[seed] for seed in values]
                rows.append((name, spread([*values.values()]), spread(apart, 3), f"{result['errors'][name]:.2%}"))
            lines += table(("form", "FID", "FID - that of torch float32", "error of the output"), *rows)
            lines += ["", *MORE.strip().split("\n"), ""]
            kept = {name: value for name, value in result["errors"].items() if "int8" in name and "torch" not in name}
            lines += table(
                ("products", "error of the output"),
                *((name.removeprefix("onnxruntime "), f"{value:.2%}") for name, value in kept.items()),
            )
    return "\n".join([*lines, ""])


def _sizes(size: int | None, half: int) -> tuple[str, str]:
    return ("", "") if size is None else (f"{size / 1e6:,.1f}", f"{half / size:.2f}")


PAGE = f"""
# Forms of a model on a CPU: torch, onnxruntime, int8

```bash
python benchmarks/onnx_forms.py --part latency --shape DiT-D14/2 --json runs/onnx-d14.json
python benchmarks/onnx_forms.py --part latency --shape DiT-XL/2 --skip int8-weights --json runs/onnx-xl.json
python benchmarks/onnx_forms.py --part fid --json runs/onnx-fid.json
python benchmarks/onnx_forms.py --page runs/onnx-d14.json runs/onnx-xl.json runs/onnx-fid.json --out docs/results/onnx.md
```

A step is one image with guidance: two rows of the network. Processor seconds of one thread, forms in turn in one process, median
(quartiles) of all rounds; ratios are of the same round. The machine was busy with other programs, which the clock would show and
processor time mostly does not. {platform.machine()} with AVX-512 VNNI, torch {torch.__version__}, weights random. MB: of the
weights, or of the graph with them.
"""
MORE = """
1,000 images, DDIM, 50 steps, guidance 1.5, features of the digits classifier, labels in turn; the same three seeds of noise for
every form. The error is the root mean square of the difference from torch float32 on noise at 256 timesteps, as a share of the
output's. `int8` and `int8-weights` leave the layers outside of the blocks in float32: embedders and the last layer.

Which layers make the error of `int8`:
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("latency", "fid"))
    parser.add_argument("--shape", choices=tuple(SHAPES), default="DiT-D14/2")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--skip", nargs="*", default=(), help="forms of graphs that are not timed, where memory is short"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num-images", type=int, default=1000)
    parser.add_argument("--json", type=Path, help="file of the numbers")
    parser.add_argument("--page", type=Path, nargs="+", help="make the page of these files")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    flush_denormals()
    if options.page:
        text = page([json.loads(path.read_text(encoding="utf-8")) for path in options.page])
        print(text)
        if options.out:
            write_text(options.out, text)
        return
    path = options.json

    def save(result: Any) -> None:
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(result, indent=1) + "\n")

    if options.part == "fid":
        known = json.loads(path.read_text(encoding="utf-8"))["fid"] if path and path.is_file() else {}
        result = fid(options.seeds, options.num_images, known, save)
    else:
        result = latency(options.shape, options.repeats, options.skip)
    print(json.dumps(result))
    save(result)


if __name__ == "__main__":
    main()
