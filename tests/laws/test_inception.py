"""The Inception network: its resize, its names in both spellings, what it refuses, and files read without running them."""

from __future__ import annotations

import io
import json
import os
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tinyfusion.core.errors import UserError
from tinyfusion.core.torchscript import is_torchscript, read_torchscript
from tinyfusion.evaluate import extractors
from tinyfusion.evaluate.extractors import DinoFeatures, open_extractor
from tinyfusion.evaluate.features import full_float32
from tinyfusion.evaluate.inception import (
    NUM_CLASSES,
    SIDE,
    Inception,
    InceptionFeatures,
    inception_from_state,
    resize_tf1,
)
from tinyfusion.evaluate.inception_names import layer_names, ours_from_graph_names

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Random weights under which features neither vanish nor grow."""
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in Inception().state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, shape in shapes.items():
        scale = (2 / np.prod(shape[1:])) ** 0.5 if len(shape) > 1 else 0.1
        values = torch.empty(shape).uniform_(-1, 1, generator=generator).mul_(scale * 3**0.5)
        found[name] = values + 1 if name.endswith(("running_var", "bn.weight")) else values
    return found


@pytest.fixture(scope="module")
def features(state: dict[str, Tensor]) -> InceptionFeatures:
    return InceptionFeatures(inception_from_state(state), CPU, batch_size=2)


def pictures(num: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(num).integers(0, 256, (num, height, width, channels), dtype=np.uint8)


# ------------------------------------------------------------------------------------------------- resize


def test_resize_leaves_images_of_the_size_alone() -> None:
    x = torch.rand(1, 3, SIDE, SIDE)
    assert resize_tf1(x, SIDE, SIDE) is x


def test_resize_puts_pixel_i_at_i_times_the_ratio() -> None:
    """Doubling: even pixels are the old ones, odd ones half way to the next, and the last repeats the border."""
    row = torch.tensor([0.0, 10.0, 40.0]).view(1, 1, 1, 3)
    assert resize_tf1(row, 1, 6).flatten().tolist() == [0, 5, 10, 25, 40, 40]
    assert resize_tf1(row.mT, 6, 1).flatten().tolist() == [0, 5, 10, 25, 40, 40]


def test_resize_to_less_takes_pixels_and_averages_nothing() -> None:
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert resize_tf1(x, 2, 2).flatten().tolist() == [0, 2, 8, 10]


@pytest.mark.parametrize("size", [(32, 32), (7, 40), (512, 300)])
def test_resize_of_a_plane_is_the_plane(size: tuple[int, int]) -> None:
    """Bilinear is exact for a + b y + c x, away from the last row and column, which repeat."""
    height, width = size
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    plane = (3 + 0.5 * y - 0.25 * x)[None, None].float()
    at_y = (torch.arange(SIDE) * (height / SIDE)).clamp(max=height - 1)
    at_x = (torch.arange(SIDE) * (width / SIDE)).clamp(max=width - 1)
    expected = 3 + 0.5 * at_y[:, None] - 0.25 * at_x
    assert torch.allclose(resize_tf1(plane, SIDE, SIDE)[0, 0], expected, atol=1e-3)


# ------------------------------------------------------------------------------------------------- network


def test_the_network_has_the_published_tensors(state: dict[str, Tensor]) -> None:
    assert len(state) == 472
    assert (
        sum(value.numel() for name, value in state.items() if "running" not in name) == 23_834_568 + 8 * 2049
    )  # Inception-v3 without its auxiliary head, of 1,008 classes
    assert state["fc.weight"].shape == (NUM_CLASSES, 2048)


def test_features_do_not_depend_on_the_batch_and_grey_is_three_equal_channels(features: InceptionFeatures) -> None:
    grey = pictures(3, 20, 24, 1)
    whole, alone = features(grey.repeat(3, axis=3)), features(grey[2:])
    assert whole.pool.shape == (3, 2048)
    assert whole.spatial is not None and whole.spatial.shape == (3, 2023)
    assert whole.logits is not None and whole.logits.shape == (3, NUM_CLASSES)
    assert np.allclose(whole.pool[2:], alone.pool, atol=1e-5)
    assert 0.01 < whole.pool.std() < 10
    assert "grey in 3 channels" in features.treatment((20, 24, 1))
    assert "grey" not in features.treatment((20, 24, 3))
    assert features.treatment((SIDE, SIDE, 3)) == "299 x 299"


def test_spatial_features_are_the_first_channels_of_mixed_6d_channels_last(features: InceptionFeatures) -> None:
    """The order of stored moments: place by place, seven channels each."""
    seen: list[Tensor] = []
    branch = features.network.get_submodule("Mixed_6d.branch1x1")
    handle = branch.register_forward_hook(lambda _module, _args, output: seen.append(output.clone()))
    found = features(pictures(1, SIDE, SIDE)).spatial
    handle.remove()
    assert found is not None
    assert np.array_equal(found.reshape(17, 17, 7), seen[0][0, :7].permute(1, 2, 0).numpy())


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 8, 8, 4), np.uint8), "1 or 3 channels"),
        (np.zeros((2, 8, 8, 3), np.float32), "uint8"),
        (np.zeros((8, 8, 3), np.uint8), "1 or 3 channels"),
    ],
)
def test_the_network_refuses_other_images(features: InceptionFeatures, images: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message):
        features(images)


def test_a_state_that_does_not_fit_is_named(state: dict[str, Tensor]) -> None:
    without = {name: value for name, value in state.items() if name != "fc.bias"}
    cases = {
        r"x\.pt does not hold the Inception network of FID: missing fc\.bias$": without,
        "unexpected AuxLogits": {**state, "AuxLogits.conv0": torch.zeros(3)},
        r"fc\.weight is \(1000, 2048\), wanted \(1008, 2048\)": {**state, "fc.weight": torch.zeros(1000, 2048)},
        r"fc\.bias is int64, wanted floats": {**state, "fc.bias": torch.zeros(NUM_CLASSES, dtype=torch.int64)},
        r"fc\.bias is not finite": {**state, "fc.bias": torch.full((NUM_CLASSES,), torch.nan)},
    }
    for message, tensors in cases.items():
        with pytest.raises(UserError, match=message):
            inception_from_state(tensors, "x.pt")


def test_full_float32_is_put_back() -> None:
    flags = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [flag.allow_tf32 for flag in flags]
    with full_float32():
        assert not any(flag.allow_tf32 for flag in flags)
    assert [flag.allow_tf32 for flag in flags] == before


# ------------------------------------------------------------------------------------------------- files


def in_graph_names(state: dict[str, Tensor], unit_weights: bool) -> dict[str, Tensor]:
    """The state as the translation spells it."""
    back = {ours: graph for graph, ours in layer_names().items()}
    spelt = {"conv.weight": "weight", "bn.bias": "beta", "bn.running_mean": "mean", "bn.running_var": "var"}
    found = {f"output.{last}": state[f"fc.{last}"] for last in ("weight", "bias")}
    for name, value in state.items():
        layer, _, role = name.rpartition(".")
        layer, _, part = layer.rpartition(".")
        role = f"{part}.{role}"
        if layer and role in spelt:
            found[f"layers.{back[layer]}.{spelt[role]}"] = value
        elif layer and role == "bn.weight" and not unit_weights:
            found[f"layers.{back[layer]}.gamma"] = value
    return found


def test_names_of_the_graph_are_ours_one_to_one(state: dict[str, Tensor]) -> None:
    assert len(set(layer_names().values())) == len(layer_names()) == 94
    found = ours_from_graph_names(in_graph_names(state, unit_weights=False))
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) for name, value in state.items())
    ones = ours_from_graph_names(in_graph_names(state, unit_weights=True))
    assert bool((ones["Mixed_7c.branch_pool.bn.weight"] == 1).all())
    inception_from_state(ones)


def test_both_ways_of_nesting_a_layer_are_known() -> None:
    kernel, mean = torch.zeros(192, 160, 7, 1), torch.zeros(192)
    flat = {"layers.mixed_6.tower.conv_2.weight": kernel, "layers.mixed_6.tower.conv_2.mean": mean}
    nested = {
        "layers.mixed_6.tower.conv_2.conv.weight": kernel,
        "layers.mixed_6.tower.conv_2.bn.running_mean": mean,
        "layers.mixed_6.tower.conv_2.bn.num_batches_tracked": torch.tensor(0),
    }
    wanted = {
        "Mixed_6d.branch7x7_3.conv.weight",
        "Mixed_6d.branch7x7_3.bn.weight",
        "Mixed_6d.branch7x7_3.bn.running_mean",
    }
    assert ours_from_graph_names(flat).keys() == ours_from_graph_names(nested).keys() == wanted
    with pytest.raises(ValueError, match=r"layers\.mixed_11\.conv\.weight .* has no place"):
        ours_from_graph_names({"layers.mixed_11.conv.weight": kernel})


class _Layer(nn.Module):
    def __init__(self, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(out * 2.0).view(out, 2, 1, 1))
        self.register_buffer("mean", torch.arange(float(out)))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight) - self.mean[:, None, None]


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        self.layers.add_module("conv", _Layer(2))
        self.layers.add_module("conv_1", _Layer(2))
        self.scale = 0.5
        self.sizes = [1, 2]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) * self.scale * self.sizes[0]


@pytest.fixture
def script(tmp_path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is on its way out; the file is what counts
        torch.jit.script(_Net()).save(str(tmp_path / "net.pt"))
    return tmp_path / "net.pt"


def test_tensors_of_a_torchscript_file_are_read_without_it(script: Path) -> None:
    assert is_torchscript(script)
    found = read_torchscript(script)
    wanted = _Net().state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


class _Touch:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch code-has-run",)


def replaced(source: Path, target: Path, content: bytes) -> Path:
    """A copy whose data.pkl is `content`."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, content if name.endswith("/data.pkl") else old.read(name))
    return target


def test_code_in_a_torchscript_file_is_never_run(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bad = replaced(script, tmp_path / "bad.pt", pickle.dumps({"layers": _Touch()}))
    with pytest.raises(UserError, match=r"holds code or foreign objects \(posix\.system\), which are never run"):
        read_torchscript(bad)
    assert not (tmp_path / "code-has-run").exists()
    pickle.load(io.BytesIO(pickle.dumps({"layers": _Touch()})))  # an ordinary reader would have run it
    assert (tmp_path / "code-has-run").exists()


def test_a_tensor_beyond_its_bytes_is_refused(script: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(script) as old, zipfile.ZipFile(tmp_path / "short.pt", "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, content[:-4] if "/data/" in name else content)
    with pytest.raises(UserError, match="no readable TorchScript file"):
        read_torchscript(tmp_path / "short.pt")


def test_one_network_has_one_hash_in_every_form(state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(state, tmp_path / "net.safetensors")
    counters = {"Mixed_5b.branch1x1.bn.num_batches_tracked": torch.tensor(7)}
    torch.save({**state, **counters}, tmp_path / "net.pth")
    found = {open_extractor.__wrapped__(str(tmp_path / name), "cpu").hash for name in ("net.safetensors", "net.pth")}
    assert len(found) == 1


def test_inception_by_name_is_fetched(
    state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(state, tmp_path / "net.safetensors")
    requested: list[str] = []

    def fetch(name: str) -> Path:
        requested.append(name)
        return tmp_path / "net.safetensors"

    monkeypatch.setattr(extractors, "fetch_weights", fetch)
    assert open_extractor.__wrapped__("inception", "cpu").name == "inception-2015-12-05"
    assert requested == ["inception-2015-12-05"]


# ------------------------------------------------------------------------------------------------- DINOv2


def test_dino_features_are_class_tokens_of_bicubic_pictures() -> None:
    network = nn.Linear(1, 1)
    seen: list[Tensor] = []

    def token(x: Tensor) -> Tensor:
        seen.append(x)
        return x.mean((2, 3))

    extractor = DinoFeatures("dinov2", network, token, CPU, batch_size=2)
    found = extractor(np.full((3, 16, 16, 3), 255, np.uint8))
    assert found.spatial is None and found.logits is None
    assert [len(x) for x in seen] == [2, 1]
    assert seen[0].shape[1:] == (3, 224, 224)
    assert np.allclose(
        found.pool[0], (1 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225]), atol=1e-5
    )
    assert extractor.treatment((16, 16, 1)) == "16 x 16 to 224 x 224 bicubic, grey in 3 channels"


def test_a_dino_folder_is_opened_by_transformers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers", reason="DINOv2 needs transformers")
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=28)
    network = transformers.Dinov2Model(transformers.Dinov2Config(**sizes, mlp_ratio=2)).eval()
    network.save_pretrained(tmp_path / "dino")
    capfd.readouterr()
    extractor = open_extractor.__wrapped__(f"dinov2:{tmp_path / 'dino'}", "cpu")
    images = pictures(2, 224, 224)
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels = torch.from_numpy(((images / 255 - mean) / deviation).astype(np.float32)).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = network(pixel_values=pixels).pooler_output
    assert np.allclose(extractor(images).pool, expected.numpy(), atol=1e-4)
    with pytest.raises(UserError, match="no DINOv2 network at"):
        open_extractor.__wrapped__(f"dinov2:{tmp_path}", "cpu")
    assert "Loading" not in capfd.readouterr().err
    tensors = load_file(tmp_path / "dino" / "model.safetensors")
    config = json.loads((tmp_path / "dino" / "config.json").read_text())
    fc1, bias = "encoder.layer.0.mlp.fc1.weight", "layernorm.bias"
    faults: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {
        f"missing_keys {fc1}": ({name: t for name, t in tensors.items() if name != fc1}, {}),
        "unexpected_keys more": ({**tensors, "more": torch.zeros(1)}, {}),
        "is no readable DINOv2 network": ({**tensors, bias: torch.zeros(3)}, {}),
        f"{bias} is not finite": ({**tensors, bias: torch.full((16,), torch.nan)}, {}),
        "num_hidden_layers 1000000000000, which is beyond": (tensors, {"num_hidden_layers": 10**12}),
        "hidden_size 1000000000, which is beyond": (tensors, {"hidden_size": 10**9}),
        "missing_keys encoder.layer.2": (tensors, {"num_hidden_layers": 3}),
    }
    for message, (tensors, sizes) in faults.items():
        save_file(tensors, tmp_path / "dino" / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / "dino" / "config.json").write_text(json.dumps({**config, **sizes}))
        with pytest.raises(UserError, match=message):
            open_extractor.__wrapped__(f"dinov2:{tmp_path / 'dino'}", "cpu")
    (tmp_path / "dino" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="is no readable safetensors file"):
        open_extractor.__wrapped__(f"dinov2:{tmp_path / 'dino'}", "cpu")
