"""`evaluate` with the Inception network, stored moments, the cache of statistics, pairs of images, and what it refuses."""

from __future__ import annotations

import json
import pickle
import shlex
import shutil
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from material import Cli
from PIL import Image
from safetensors.torch import load_file, save_file
from test_bad_input import assert_one_error_line, tree_hash

from tinyfusion.data import image_source
from tinyfusion.evaluate.inception import Inception, InceptionFeatures
from tinyfusion.evaluate.metrics import feature_moments, frechet_distance
from tinyfusion.jobs import scoring

EVALUATE = "evaluate --reference digits --out made/evaluation.json"
SAMPLES = f"{EVALUATE} --samples images.npz"


def random_weights(folder: Path) -> Path:
    """Random weights of the Inception network, tame enough to give finite features."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in Inception().state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        scale = (6 / shape[1:].numel()) ** 0.5 if len(shape) > 1 else 0.1
        values = torch.empty(shape).uniform_(-1, 1, generator=generator).mul_(scale)
        state[name] = values + 1 if name.endswith(("running_var", "bn.weight")) else values
    save_file(state, folder / "inception.safetensors")
    return folder / "inception.safetensors"


@pytest.fixture(scope="session")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setattr(scoring, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


# ------------------------------------------------------------------------------------------------------------ bad input


@dataclass(frozen=True)
class Row:
    """A cause. arguments: the command, {inception} for weights of the network. prepare: makes what is wrong."""

    id: str
    arguments: str
    message: tuple[str, ...]
    prepare: Callable[[], Any] | None = None


def row(id: str, arguments: str, *message: str, prepare: Callable[[], Any] | None = None) -> Row:
    return Row(id, arguments, message, prepare)


def npz(name: str, **arrays: Any) -> Callable[[], None]:
    return lambda: np.savez(name, **arrays)


def pair(protocol: str | None, **changes: Any) -> Callable[[], None]:
    """images.npz with a record of `sample`, and other.npz with one that says `protocol`."""

    def prepare() -> None:
        with np.load("images.npz") as archive:
            arrays = dict(archive)
        np.savez("other.npz", **{**arrays, **{name: change(arrays) for name, change in changes.items()}})
        Path("images.json").write_text(json.dumps({"protocol": PROTOCOL}), encoding="utf-8")
        if protocol is not None:
            Path("other.json").write_text(json.dumps({"protocol": protocol}), encoding="utf-8")

    return prepare


class _Touch:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("code-has-run"),)


def script(content: bytes | None) -> Callable[[], None]:
    """net.pt, a TorchScript file of a small network; content: of its data.pkl instead of its own."""

    def prepare() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is on its way out; the file is what counts
            torch.jit.script(torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1))).save("whole.pt")
        with zipfile.ZipFile("whole.pt") as old, zipfile.ZipFile("net.pt", "w") as new:
            for name in old.namelist():
                own = content is None or not name.endswith("/data.pkl")
                new.writestr(name, old.read(name) if own else content)
        Path("whole.pt").unlink()

    return prepare


def dino_of_another_kind() -> None:
    Path("vit").mkdir()
    Path("vit/config.json").write_text('{"model_type": "vit"}', encoding="utf-8")


PROTOCOL = "40 images | ddpm 2 steps | guidance 1.5 on 1 channel (published) | labels uniform | float32 | seed 0"
IMAGES = np.zeros((40, 8, 8, 1), np.uint8)
FEATURES = f"{SAMPLES} --set evaluate.features"
REFERENCE = f"{SAMPLES} --reference moments.npz"
AGAINST = f"{SAMPLES} --against other.npz"
ROWS = [
    row("features-unknown", f"{FEATURES}=incepton", "unknown feature extractor 'incepton'", "did you mean 'inception'"),
    row("features-file-missing", f"{FEATURES}=gone.pth", "no Inception weights at gone.pth", "features=inception", "https://"),
    row("features-file-torn", f"{FEATURES}=truncated.pt", "truncated.pt is not a model file, or it is truncated"),
    row("features-file-torn-safetensors", f"{FEATURES}=truncated.safetensors", "no readable safetensors file"),
    row("features-file-nested", f"{FEATURES}=good.pt", "good.pt does not hold the Inception network of FID: missing", "and ", " more"),
    row("features-file-list", f"{FEATURES}=list.pt", "list.pt holds a list, not a state dict"),
    row("features-file-code", f"{FEATURES}=malicious.pt", "malicious.pt holds code", "never run"),
    row("features-other-network", f"{FEATURES}=missing.pt", "missing.pt does not hold the Inception network of FID: missing"),
    row("features-script-code", f"{FEATURES}=net.pt", "net.pt holds code or foreign objects", "never run",
        prepare=script(pickle.dumps(_Touch()))),
    row("features-script-torn", f"{FEATURES}=net.pt", "net.pt is no readable TorchScript file", prepare=script(b"\x80\x02")),
    row("features-script-other", f"{FEATURES}=net.pt", "net.pt does not hold the Inception network", "missing", prepare=script(None)),
    row("features-folder", f"{FEATURES}=thesis", "unknown feature extractor 'thesis'", "classifier.json"),
    row("features-dino-missing", f"{FEATURES}=dinov2:gone", "no DINOv2 network at gone"),
    row("features-dino-other", f"{FEATURES}=dinov2:vit", "vit is a 'vit' network, not dinov2", prepare=dino_of_another_kind),
    row("neighbours-zero", f"{SAMPLES} --set evaluate.neighbours=0", "evaluate.neighbours must be at least 1; got 0"),
    row("splits-zero", f"{SAMPLES} --set evaluate.is_splits_size=0", "evaluate.is_splits_size must be at least 1; got 0"),
    row("samples-floats", f"{EVALUATE} --samples floats.npz", "take uint8 images (0 to 255); got float32",
        prepare=npz("floats.npz", arr_0=IMAGES.astype(np.float32))),
    row("samples-four-channels", f"{EVALUATE} --samples rgba.npz --set evaluate.features={{inception}}", "1 or 3 channels",
        prepare=npz("rgba.npz", arr_0=np.zeros((40, 8, 8, 4), np.uint8))),
    row("reference-of-another-size", f"{SAMPLES} --reference large.npz --set evaluate.features={{inception}}",
        "reference large.npz has images (16, 16, 1), the samples (8, 8, 1)", "bring both to one size"),
    row("reference-mean-alone", REFERENCE, "moments.npz has mu without sigma", prepare=npz("moments.npz", mu=np.zeros(3))),
    row("reference-misfit", REFERENCE, "mu (3,) and sigma (4, 4) do not fit together",
        prepare=npz("moments.npz", mu=np.zeros(3), sigma=np.eye(4))),
    row("reference-not-finite", REFERENCE, "mu is float64 or not finite",
        prepare=npz("moments.npz", mu=np.full(3, np.nan), sigma=np.eye(3))),
    row("reference-integers", REFERENCE, "mu is int64 or not finite",
        prepare=npz("moments.npz", mu=np.zeros(3, np.int64), sigma=np.eye(3))),
    row("reference-code", REFERENCE, "moments.npz cannot be read as an npz of plain arrays",
        prepare=lambda: np.savez("moments.npz", mu=np.array([_Touch()], dtype=object), sigma=np.eye(1))),
    row("reference-without-images", REFERENCE, "holds moments of Inception features and no images", "features=inception",
        prepare=npz("moments.npz", mu=np.zeros(3), sigma=np.eye(3))),
    row("reference-other-features", f"{REFERENCE} --set evaluate.features={{inception}}", "mu has 3 values; Inception's has 2048",
        prepare=npz("moments.npz", mu=np.zeros(3), sigma=np.eye(3))),
    row("reference-spatial-alone", f"{REFERENCE} --set evaluate.features={{inception}}", "has mu_s without mu",
        prepare=npz("moments.npz", mu_s=np.zeros(2023), sigma_s=np.eye(2023))),
    row("reference-one-image", f"{SAMPLES} --reference one.npz", "has 1 image: a covariance needs at least 2",
        prepare=npz("one.npz", arr_0=IMAGES[:1])),
    row("against-missing", AGAINST, "no images at other.npz: no such file"),
    row("against-folder", f"{SAMPLES} --against thesis", "compares an npz of `sample` with another; thesis is none"),
    row("against-without-record", AGAINST, "other.npz has no record of `sample` (other.json)", prepare=pair(None)),
    row("against-other-seed", AGAINST, "drawn with 'seed 1', images.npz with 'seed 0'",
        prepare=pair(PROTOCOL.replace("seed 0", "seed 1"))),
    row("against-other-sampler", AGAINST, "drawn with 'ddim 2 steps'", prepare=pair(PROTOCOL.replace("ddpm", "ddim"))),
    row("against-other-labels", AGAINST, "has other labels (arr_1)", prepare=pair(PROTOCOL, arr_1=lambda a: a["arr_1"][::-1])),
    row("against-other-shape", AGAINST, "pairs are of one shape", prepare=pair(PROTOCOL, arr_0=lambda a: a["arr_0"][:30],
        arr_1=lambda a: a["arr_1"][:30])),
]  # fmt: skip


@pytest.mark.parametrize("cause", ROWS, ids=[r.id for r in ROWS])
def test_bad_input(cause: Row, cli: Cli, work: Path, inception: Path, cached: Path) -> None:
    if cause.prepare:
        cause.prepare()
    before = tree_hash(work)
    outcome = cli(*shlex.split(cause.arguments.format(inception=inception)))
    assert_one_error_line(outcome.code, outcome.err, cause.message)
    assert tree_hash(work) == before
    assert not cached.exists()


def test_rows_are_distinct() -> None:
    assert len({r.id for r in ROWS}) == len(ROWS) >= 12
    assert len({(r.arguments, r.prepare) for r in ROWS}) == len(ROWS)


def test_a_large_npz_that_was_cut_short_is_refused(cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its header states more images than the file has."""
    np.save("arr_0.npy", IMAGES)
    content = Path("arr_0.npy").read_bytes()
    with zipfile.ZipFile("cut.npz", "w") as archive:
        archive.writestr("arr_0.npy", content[:-100])
    monkeypatch.setattr(image_source, "IN_MEMORY_BYTES", 0)
    outcome = cli(*shlex.split(f"{EVALUATE} --samples cut.npz"))
    assert_one_error_line(
        outcome.code,
        outcome.err,
        ("cut.npz cannot be read", "arr_0 claims", "2,560 bytes) and holds 2,460 bytes"),
    )


# -------------------------------------------------------------------------------------------------------------- numbers


def evaluated(cli: Cli, arguments: str) -> dict[str, Any]:
    """The record of a successful evaluation, at a name of its own."""
    out = Path(f"made/{len(list(Path('made').glob('*')) if Path('made').is_dir() else [])}.json")
    outcome = cli(*shlex.split(arguments.replace("made/evaluation.json", str(out))))
    assert outcome.code == 0, outcome.err
    return json.loads(out.read_text(encoding="utf-8"))


NUMBERS = ("fid", "sfid", "inception_score", "precision", "recall", "num_images")


@pytest.mark.parametrize("form", ["npz", "compressed", "folder"])
def test_large_sets_are_read_in_parts_with_the_same_numbers(
    form: str, cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with np.load("images.npz") as archive:
        images = archive["arr_0"]
    name = {"npz": "images.npz", "compressed": "small.npz", "folder": "pictures"}[form]
    np.savez_compressed("small.npz", arr_0=images)
    Path("pictures").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image[..., 0]).save(f"pictures/{i:03d}.png")
    whole = evaluated(cli, f"{EVALUATE} --samples {name}")
    for module in (image_source, scoring):
        monkeypatch.setattr(module, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(scoring, "READ_IMAGES", 7)
    parts = evaluated(cli, f"{EVALUATE} --samples {name}")
    assert [parts[key] for key in NUMBERS] == pytest.approx([whole[key] for key in NUMBERS], rel=1e-6)
    assert parts["recipe"] == whole["recipe"]  # the hash too
    assert parts["nearest_reference_distance"] is None  # it wants the pixels of both in memory


def test_stored_moments_serve_the_distances_and_images_the_rest(
    cli: Cli, work: Path, inception: Path, cached: Path
) -> None:
    rng = np.random.default_rng(1)
    real = rng.integers(0, 256, (4, 8, 8, 1), dtype=np.uint8)
    features = InceptionFeatures(_network(inception), torch.device("cpu"))
    found = features(real)
    assert found.spatial is not None
    pool, spatial = feature_moments(found.pool), feature_moments(found.spatial)
    moments = dict(mu=pool.mean + 0.5, sigma=pool.covariance, mu_s=spatial.mean, sigma_s=spatial.covariance)
    np.savez("adm.npz", arr_0=real, **moments)
    np.savez("plain.npz", arr_0=real)
    np.savez("moments.npz", **{key: moments[key] for key in ("mu", "sigma")})
    np.savez("drawn.npz", arr_0=rng.integers(0, 256, (3, 8, 8, 1), dtype=np.uint8))
    command = (
        f"{EVALUATE} --samples drawn.npz --set evaluate.neighbours=1 --set evaluate.features={inception} --reference"
    )
    stored, plain, alone = (evaluated(cli, f"{command} {name}.npz") for name in ("adm", "plain", "moments"))
    assert stored["fid"] == pytest.approx(alone["fid"], rel=1e-9)
    assert stored["fid"] - plain["fid"] != pytest.approx(0, abs=1e-3)
    assert stored["sfid"] == pytest.approx(plain["sfid"], rel=1e-5)
    with np.load("drawn.npz") as archive:
        drawn = feature_moments(features(archive["arr_0"]).pool)
    assert plain["fid"] == pytest.approx(frechet_distance(*pool, *drawn), rel=1e-5)
    assert [stored[key] for key in ("precision", "recall")] == [plain[key] for key in ("precision", "recall")]
    assert [alone[key] for key in ("precision", "recall", "sfid")] == [None, None, None]
    for record, expected in (
        (stored, " 4 with stored moments"),
        (alone, " 0 with stored moments"),
        (plain, " 4 | 3 images"),
    ):
        assert expected in record["protocol"]
        assert "at 8 x 8 to 299 x 299 bilinear (TF-1), grey in 3 channels, k 1" in record["protocol"]
    assert stored["features"]["name"] == "inception-2015-12-05"


def _network(weights: Path) -> Inception:
    from tinyfusion.evaluate.inception import inception_from_state

    return inception_from_state(load_file(weights))


def test_statistics_of_a_reference_are_computed_once(
    cli: Cli, work: Path, inception: Path, cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(1)
    np.savez("real.npz", arr_0=rng.integers(0, 256, (4, 8, 8, 1), dtype=np.uint8))
    np.savez("drawn.npz", arr_0=rng.integers(0, 256, (3, 8, 8, 1), dtype=np.uint8))
    command = f"{EVALUATE} --samples drawn.npz --set evaluate.neighbours=1 --set evaluate.features={inception} --reference real.npz"
    seen: list[int] = []
    call = InceptionFeatures.__call__

    def counted(self: InceptionFeatures, images: np.ndarray) -> Any:
        seen.append(len(images))
        return call(self, images)

    monkeypatch.setattr(InceptionFeatures, "__call__", counted)
    first = evaluated(cli, command)
    (file,) = (cached / "moments").iterdir()
    second = evaluated(cli, command)
    assert sorted(seen) == [3, 3, 4]
    assert [first[key] for key in NUMBERS] == [second[key] for key in NUMBERS]
    tensors = load_file(file)
    tensors["pool_mean"][0] += 1
    save_file(tensors, file)
    outcome = cli(*shlex.split(command))
    assert outcome.code == 0
    assert "is damaged" in outcome.err and "computed again" in outcome.err
    assert sorted(seen) == [3, 3, 3, 4, 4]
    shutil.move("real.npz", "renamed.npz")  # it goes by content, not by name
    third = evaluated(cli, command.replace("real.npz", "renamed.npz"))
    assert [third[key] for key in NUMBERS] == [first[key] for key in NUMBERS]
    assert sorted(seen) == [3, 3, 3, 3, 4, 4]
    assert len(list((cached / "moments").iterdir())) == 1


def test_a_cache_that_cannot_be_written_costs_time_alone(
    cli: Cli, work: Path, inception: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file", encoding="utf-8")
    monkeypatch.setattr(scoring, "cache_folder", lambda: tmp_path / "cache")
    np.savez("real.npz", arr_0=np.random.default_rng(1).integers(0, 256, (2, 8, 8, 1), dtype=np.uint8))
    outcome = cli(
        *shlex.split(
            f"{EVALUATE} --samples real.npz --set evaluate.neighbours=1 --set evaluate.features={inception} --reference real.npz"
        )
    )
    assert outcome.code == 0, outcome.err
    assert "are not cached" in outcome.err


def test_pairs_from_equal_seeds_are_compared(cli: Cli, work: Path) -> None:
    for model in ("teacher", "student", "other-teacher"):
        drawn = cli(*shlex.split(f"sample --model {model} --num-images 12 --num-steps 2 --out {model}.npz"))
        assert drawn.code == 0, drawn.err
    command = f"{EVALUATE} --samples student.npz"
    found = evaluated(cli, f"{command} --against teacher.npz")["against"]
    assert found["name"] == "teacher.npz"
    assert 0 < found["psnr_db"] < 10 * np.log10(255**2 * 64)
    assert -1 < found["ssim"] < 1
    same = evaluated(cli, f"{command} --against student.npz")["against"]
    assert same["ssim"] == pytest.approx(1)
    assert same["psnr_db"] == pytest.approx(10 * np.log10(255**2 * 64))
    assert "against" not in evaluated(cli, command)
    outcome = cli(*shlex.split(f"{command} --against teacher.npz --json"))
    assert outcome.last_json["against"]["psnr_db"] == found["psnr_db"]
    again = cli(*shlex.split(f"{command} --against other-teacher.npz"))
    assert again.code == 2
    assert "another recipe (against:" in again.err


def test_pairs_may_differ_in_the_precision_of_the_arithmetic(cli: Cli, work: Path) -> None:
    pair(PROTOCOL.replace("float32", "bfloat16 compiled"))()
    assert evaluated(cli, AGAINST)["against"]["ssim"] == pytest.approx(1)


def test_a_dry_run_computes_no_features(
    cli: Cli, work: Path, inception: Path, cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("features were computed")

    monkeypatch.setattr(InceptionFeatures, "__call__", never)
    outcome = cli(*shlex.split(f"{SAMPLES} --set evaluate.features={inception} --dry-run --json"))
    assert outcome.code == 0, outcome.err
    assert "inception-2015-12-05" in outcome.last_json["protocol"]
    assert not Path("made").exists() and not cached.exists()
