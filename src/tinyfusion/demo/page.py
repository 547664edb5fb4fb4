"""The files of the page: what it says of the models as JSON, its scripts, and networks and runtime as scripts of text.

Everything that is loaded is a classic script, since browsers read nothing else from a page that is opened from the disk.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from tinyfusion.core.errors import UserError
from tinyfusion.demo.schedules import PageSampler, samplers_of
from tinyfusion.models.loaded import LoadedModel

NOISE = "sample-noise"  # the purpose of the noise of `sample`, see `sample/drive.py`
_SCRIPTS = ("index.html", "style.css", "page.js")
OUR_FILES = r"index\.html|style\.css|page\.js|facts\.js|tinyfusion\.json|assets/[\w-]+\.js"  # a regular expression of their paths
_WORKER = ("sampling.js", "worker.js")
GUIDANCE = 4.0  # the largest of the slider
_MOST_NETWORK_BYTES = 250 * 2**20  # as text in one script; engines limit texts to about 500 MB


@dataclass(frozen=True)
class PageModel:
    """A model of the page. name: as the user knows it; source: as typed; graph: of `onnx_graph(model, switches=True)`."""

    name: str
    source: str
    model: LoadedModel
    graph: bytes


def check_model(model: LoadedModel, source: str) -> list[PageSampler]:
    """The samplers that the page has for a model. Raises UserError if it cannot draw with it."""
    if model.family.texts is not None:
        raise UserError(f"the page draws classes, and {source} takes texts: give a model of classes")
    if model.of_latents:
        raise UserError(
            f"the page shows pixels, and {source} draws latents, which need an autoencoder: give a model of pixels (1 or 3 channels)"
        )
    if model.dynamic is not None:
        raise UserError(
            f"{source} chooses heads, channels and tokens anew at every timestep: give the static model it was made from"
        )
    return samplers_of(model)


def check_pair(models: Mapping[str, LoadedModel]) -> None:
    """Raise UserError unless the models, by source, draw images of one size from one noise, of the same number of classes."""
    sizes = {
        source: {"channels": m.arch.in_channels, "side": m.arch.input_size, "classes": m.arch.num_classes}
        for source, m in models.items()
    }
    (first, wanted), *others = sizes.items()
    for source, size in others:
        if size != wanted:
            words = [", ".join(f"{number} {name}" for name, number in each.items()) for each in (wanted, size)]
            raise UserError(
                f"two models draw from one noise if sizes are equal: {first} has {words[0]}; {source} has {words[1]}"
            )


# ------------------------------------------------------------------------------------------------------------------ blocks


def ancestors(model: LoadedModel) -> dict[str, tuple[int, list[int]]]:
    """Every ancestor by its hash, oldest first, then the model: its depth, and which of its blocks the model still has."""
    kept, depth = list(range(len(model.stack))), len(model.stack)
    found, below = {model.hash(): (depth, kept)}, model.facts.kept
    for parent in reversed(model.facts.lineage):
        if below is None or parent.get("depth") is None:
            break
        kept = [_flat(below, parent["depth"])[block] for block in kept]
        found = {parent["hash"]: (sum(parent["depth"].values()), kept), **found}
        below = parent["kept"]
    return found


def _flat(kept: Mapping[str, Sequence[int]], depths: Mapping[str, int]) -> list[int]:
    """Kept indices of all lists, counted through the lists."""
    first, flat = 0, []
    for name, depth in depths.items():
        flat += [first + index for index in kept[name]]
        first += depth
    return flat


def block_columns(models: Sequence[LoadedModel]) -> tuple[int, list[list[int]]]:
    """Number of columns of the picture of blocks, and the column of every block of each model.

    Columns are the blocks of the oldest ancestor that all models share, else each model has its own blocks from the left.
    """
    families = [ancestors(model) for model in models]
    for name, (depth, _) in families[0].items():
        if all(name in family for family in families):
            return depth, [family[name][1] for family in families]
    return max(len(model.stack) for model in models), [list(range(len(model.stack))) for model in models]


def roles(models: Sequence[LoadedModel]) -> list[str]:
    """What the models are to each other: teacher and student where one descends from the other; else empty."""
    hashes = [model.hash() for model in models]
    if len(models) == 2:
        for i, other in ((0, 1), (1, 0)):
            if hashes[i] != hashes[other] and hashes[i] in ancestors(models[other]):
                return ["Teacher", "Student"] if i == 0 else ["Student", "Teacher"]
    return [""] * len(models)


# ------------------------------------------------------------------------------------------------------------------- files


def page_facts(
    models: Sequence[PageModel], names: Sequence[str], guidance: float, seed: int, runtime: str
) -> dict[str, Any]:
    """What the page says of the models and needs for drawing.

    names: of the classes. guidance, seed: at first. runtime: its name and version.
    """
    loaded = [each.model for each in models]
    columns, positions = block_columns(loaded)
    arch = loaded[0].arch
    guided = any(model.takes_guidance for model in loaded)
    described = [
        {
            "name": each.name,
            "source": each.source,
            "role": role,
            "hash": each.model.hash(),
            "depth": len(each.model.stack),
            "parameters": sum(p.numel() for p in each.model.module.parameters()),
            "columns": places,
            "outputChannels": _output_channels(each.model),
            "guidedChannels": each.model.guided_channels,
            "nullLabel": each.model.arch.num_classes if each.model.takes_guidance else None,
            "samplers": [sampler.plain() for sampler in check_model(each.model, each.source)],
        }
        for each, role, places in zip(models, roles(loaded), positions, strict=True)
    ]
    return {
        "runtime": runtime,
        "image": {"channels": arch.in_channels, "side": arch.input_size, "pixels": arch.input_size**2},
        "classes": list(names),
        "columns": columns,
        "guidance": {"chosen": guidance if guided else 1, "most": max(GUIDANCE, guidance) if guided else 1},
        "seed": seed,
        "noiseKey": str(int.from_bytes(hashlib.sha256(NOISE.encode()).digest()[:8], "little")),
        "models": described,
    }


def _output_channels(model: LoadedModel) -> int:
    """Channels of the network's output, a variance included."""
    return int(model.arch.in_channels if model.family.process == "flow" else model.arch.out_channels)


def page_files(facts: Mapping[str, Any], models: Sequence[PageModel], runtime: Mapping[str, bytes]) -> dict[str, bytes]:
    """All files of the page by their relative path. runtime: its script, glue and program, in this order.

    Raises UserError on a network that is too large for a page.
    """
    files = {name: _own(name) for name in _SCRIPTS}
    script, glue, program = runtime.values()
    worker = b"\n".join([script, *(_own(name) for name in _WORKER)])
    assets = {"worker": worker, "glue": glue, "program": program}
    for number, each in enumerate(models):
        if len(each.graph) > _MOST_NETWORK_BYTES:
            size = f"{len(each.graph) / 2**20:,.0f} MiB"
            raise UserError(
                f"{each.source} has {size} of weights, and a page takes {_MOST_NETWORK_BYTES >> 20} MiB: give a smaller model"
            )
        assets[f"network-{number}"] = each.graph
    packed = {name: _packed(content) for name, content in assets.items()}
    files |= {f"assets/{name}.js": f'tinyfusionAsset("{name}", "{text}");\n'.encode() for name, text in packed.items()}
    sizes = {name: len(files[f"assets/{name}.js"]) for name in packed}
    files["facts.js"] = f"const tinyfusionFacts = {json.dumps({**facts, 'assets': sizes}, allow_nan=False)};\n".encode()
    return files


def _own(name: str) -> bytes:
    return (resources.files("tinyfusion.demo") / "page" / name).read_bytes()


def _packed(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, mtime=0)).decode()
