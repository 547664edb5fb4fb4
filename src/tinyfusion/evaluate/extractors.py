"""Open feature extractors by name: weights of the package, of a file, or downloaded once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyfusion.config.loading import nearest
from tinyfusion.core.device import choose_device
from tinyfusion.core.errors import UserError
from tinyfusion.core.reading import check_plain, explained, read_json_object
from tinyfusion.core.tensors import read_folder_weights, read_safetensors, read_tensor_file
from tinyfusion.core.torchscript import is_torchscript, read_torchscript
from tinyfusion.core.weights import fetch_weights, known_weights
from tinyfusion.evaluate.features import EXTRACTORS, FEATURE_CHOICES, FeatureExtractor
from tinyfusion.evaluate.inception import INCEPTION, InceptionFeatures, inception_from_state
from tinyfusion.evaluate.inception_names import ours_from_graph_names
from tinyfusion.families.tensor_checks import check_finite, check_sizes
from tinyfusion.models.autoencoder import check_loaded, quiet_libraries
from tinyfusion.models.hub import transformers_folder
from tinyfusion.models.statedicts import find_state_dict

SHORT = "inception"  # short name of the Inception network
DINO = "dinov2:"  # prefix of a folder with a DINOv2 network
_MARK = "Conv2d_1a_3x3.conv.weight"  # identifies files of the Inception network
_DINO_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "mlp_ratio", "patch_size", "num_channels")
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, pixels in [0, 1]
_SUFFIXES = (".pth", ".pt", ".safetensors")


@cache
def open_extractor(name: str, device: str) -> FeatureExtractor:
    """Open a feature extractor by name or from files; `device` is for the large networks.

    Names: extractors of the package, "inception", or known weights of that kind. Files: weights of the Inception network, a
    folder with classifier.json, "dinov2:" and a folder or hub id. Raises UserError if it does not exist or is damaged.
    """
    if not name:
        raise UserError(f"no feature extractor is named for these images; {FEATURE_CHOICES}")
    if name in EXTRACTORS:
        return _classifier(Path(str(resources.files("tinyfusion"))) / "assets" / name, name)
    path = Path(name)
    if name.startswith(DINO):
        return _dino(transformers_folder(name.removeprefix(DINO), "a DINOv2 network"), choose_device(device))
    if (path / "classifier.json").is_file():
        return _classifier(path, None)
    if path.suffix in _SUFFIXES or path.is_file():
        return _inception(path, choose_device(device))
    fetched = [SHORT, *(known for known, entry in known_weights().items() if entry.kind == "inception")]
    if name in fetched:
        try:
            file = fetch_weights(INCEPTION if name == SHORT else name)
        except UserError as error:
            others = f"{DINO}FOLDER of a DINOv2 network saved by transformers, or a folder with classifier.json"
            offline = "Without a network: --set evaluate.features=FILE of those weights, downloaded elsewhere"
            raise UserError(f"{error}. {offline}, or {others}") from error
        return _inception(file, choose_device(device))
    files = f"a folder with classifier.json, a file of Inception weights, {DINO}FOLDER"
    raise UserError(f"unknown feature extractor {name!r}{nearest(name, [*EXTRACTORS, *fetched])} (or {files})")


def _classifier(folder: Path, shipped: str | None) -> FeatureExtractor:
    remedy = "install tinyfusion again" if shipped else "make it again"
    record = read_json_object(folder / "classifier.json")
    try:
        label = shipped or str(record["name"])
        build = EXTRACTORS[shipped or "digits-classifier"]
        extractor = build(label, record["arch"], read_safetensors(folder / "classifier.safetensors"))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder} is damaged ({error}): {remedy}") from error
    if extractor.hash != record.get("hash"):
        raise UserError(f"{folder} is damaged: its tensors do not give the hash in classifier.json; {remedy}")
    return extractor


def _inception(path: Path, device: torch.device) -> FeatureExtractor:
    """Open the Inception network from a state dict or the tensors of the TorchScript translation."""
    check_plain(path)
    if not path.is_file():
        advice = f"--set evaluate.features={SHORT} downloads them once ({known_weights()[INCEPTION].address})"
        raise UserError(f"no Inception weights at {path}: no such file; {advice}")
    with explained(f"{path} does not hold the Inception network of FID", ValueError):
        if path.suffix != ".safetensors" and is_torchscript(path):
            tensors = ours_from_graph_names(read_torchscript(path))
        else:
            tensors = find_state_dict(read_tensor_file(path), [_MARK], "raw", path).tensors
    return InceptionFeatures(inception_from_state(tensors, str(path)), device)


def _dino(folder: Path, device: torch.device) -> FeatureExtractor:
    """Open a DINOv2 network from a folder saved by transformers."""
    if not (folder / "config.json").is_file():
        raise UserError(f"no DINOv2 network at {folder}: wanted a folder with config.json and its weights")
    try:
        from transformers import Dinov2Model  # late: slow to import
    except ImportError as error:
        raise UserError("features dinov2 need transformers: pip install transformers") from error
    config = read_json_object(folder / "config.json")
    if (kind := config.get("model_type")) != "dinov2":
        raise UserError(f"{folder} is a {kind!r} network, not dinov2")
    tensors, _ = read_folder_weights(folder, "model")
    check_sizes({size: config[size] for size in _DINO_SIZES if size in config}, tensors, str(folder / "config.json"))
    check_finite(tensors, f"the weights in {folder} are damaged")
    del tensors
    # of transformers, huggingface_hub, safetensors or json
    with explained(f"{folder} is no readable DINOv2 network", Exception), quiet_libraries():
        load: Any = Dinov2Model.from_pretrained
        settings = {"local_files_only": True, "dtype": torch.float32, "use_safetensors": True}
        network, report = load(folder, **settings, output_loading_info=True)
    check_loaded(report, folder)
    return DinoFeatures("dinov2", network, lambda x: network(pixel_values=x).last_hidden_state[:, 0], device)


class DinoFeatures(FeatureExtractor):
    """`FeatureExtractor` of a DINOv2 network for FD-DINOv2, their Frechet distance (arXiv 2306.04675).

    class_token: (N, 3, 224, 224) to (N, D), after the last norm, by the weights of `network`. Pictures are resized (bicubic,
    antialiased) and normalised as in training. Without maps and classes there is no sFID and no Inception Score.
    Differs: the published evaluation resizes with Pillow in 8 bits; this one in float32, without rounding.
    """

    side, rule = 224, "bicubic"

    def __init__(
        self,
        name: str,
        network: nn.Module,
        class_token: Callable[[Tensor], Tensor],
        device: torch.device,
        batch_size: int = 64,
    ) -> None:
        super().__init__(name, network, device, batch_size)
        self.class_token = class_token

    def features_of(self, pixels: Tensor) -> tuple[Tensor, None, None]:
        """As in `FeatureExtractor`."""
        pixels = pixels.expand(-1, 3, -1, -1)
        size = (self.side, self.side)
        if pixels.shape[2:] != size:
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 255)
        mean, deviation = (torch.tensor(v, device=self.device)[:, None, None] for v in (_MEAN, _DEVIATION))
        return self.class_token((pixels / 255 - mean) / deviation), None, None
