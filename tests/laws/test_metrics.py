"""Metrics against closed forms, the yardstick against known damage, image files against bad input."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from tinyfusion.core.errors import UserError
from tinyfusion.core.recipe import Recipe
from tinyfusion.core.rng import Randomness
from tinyfusion.data.batches import ShuffledBatches
from tinyfusion.data.digits import load_digits
from tinyfusion.data.images import image_grid, read_image_folder, read_images_npz, write_grid_png, write_images_npz
from tinyfusion.evaluate import metrics
from tinyfusion.evaluate.metrics import (
    feature_moments,
    frechet_distance,
    inception_score,
    nearest_training_distance,
    precision_recall,
)
from tinyfusion.jobs.assemble import RunOptions
from tinyfusion.jobs.evaluate import evaluate, open_extractor, open_reference, score
from tinyfusion.jobs.sample import write_samples

BLUR_SIGMAS_PX = (0.3, 0.4, 0.5, 0.7, 1.0)
NOISE_SIGMAS = (0.05, 0.1, 0.2, 0.4, 0.8)


def normal(name: str, *shape: int) -> np.ndarray:
    """Addressed standard normals, float64."""
    return Randomness(7).at(0, 0, shape[0]).normal(name, shape[1:]).astype(np.float64)


def to_uint8(x: np.ndarray) -> np.ndarray:
    """(N, C, H, W) in [-1, 1] to uint8 (N, H, W, C), by the published rule."""
    return np.trunc(np.clip(127.5 * x + 128, 0, 255)).astype(np.uint8).transpose(0, 2, 3, 1)


# ------------------------------------------------------------------------------------------------- Frechet distance


def test_frechet_distance_of_commuting_gaussians_is_the_closed_form() -> None:
    """For covariances of one eigenbasis: |mu1 - mu2|^2 + sum (sqrt a - sqrt b)^2."""
    basis = np.linalg.qr(normal("basis", 12, 12))[0]
    a, b = np.linspace(0.0, 3.0, 12), np.linspace(2.0, 0.1, 12)
    mu1, mu2 = normal("mu", 2, 12)
    expected = ((mu1 - mu2) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    got = frechet_distance(mu1, basis * a @ basis.T, mu2, basis * b @ basis.T)
    assert got == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_of_two_by_two_covariances_is_the_closed_form() -> None:
    """Not commuting: tr (A B)^(1/2) = sqrt(tr AB + 2 sqrt(det AB)) for 2 x 2 matrices."""
    a, b = np.array([[2.0, 0.9], [0.9, 1.0]]), np.array([[0.5, -0.3], [-0.3, 3.0]])
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    assert frechet_distance([0, 0], a, [3, 4], b) == pytest.approx(25 + np.trace(a) + np.trace(b) - 2 * root, rel=1e-12)


@pytest.mark.parametrize("num", [20, 300])
def test_frechet_distance_of_equal_statistics_is_zero_and_symmetric(num: int) -> None:
    """Also with fewer samples than dimensions."""
    first, second = feature_moments(normal("first", num, 64)), feature_moments(2 * normal("second", num, 64) + 1)
    assert frechet_distance(*first, *first) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(*first, *second) == pytest.approx(frechet_distance(*second, *first), rel=1e-10)


def test_moments_are_unbiased() -> None:
    features = normal("features", 30, 5)
    mean, covariance = feature_moments(features.astype(np.float32))
    assert np.allclose(mean, features.mean(0), atol=1e-7)
    assert np.allclose(covariance, np.cov(features, rowvar=False), atol=1e-6)


# ------------------------------------------------------------------------------------------------- Inception Score


def test_inception_score_lies_between_one_and_the_number_of_classes() -> None:
    certain = np.where(np.eye(10)[np.arange(50) % 10] > 0, 0.0, -1e5)  # probabilities of exactly 0 and 1
    assert inception_score(certain) == pytest.approx(10)
    assert inception_score(np.zeros((50, 10))) == pytest.approx(1)
    assert 1 < inception_score(normal("logits", 50, 10)) < 10


def test_inception_score_averages_contiguous_splits() -> None:
    logits = normal("logits", 70, 10)
    splits = [inception_score(part) for part in (logits[:30], logits[30:60], logits[60:])]
    assert inception_score(logits, 30) == pytest.approx(np.mean(splits))
    assert inception_score(logits, 30) != pytest.approx(inception_score(logits))


# ------------------------------------------------------------------------------------------------- precision, recall


def test_precision_and_recall_of_identical_sets_are_one() -> None:
    points = normal("points", 100, 16) + 1e4
    assert precision_recall(points, points) == (1.0, 1.0)
    copies = np.repeat(points[:10], 10, axis=0)  # radii of exactly 0
    assert precision_recall(copies, copies[::-1]) == (1.0, 1.0)


def test_precision_and_recall_tell_fidelity_from_coverage() -> None:
    """Samples of one of two far clusters are all faithful and cover half."""
    cluster = normal("cluster", 100, 8)
    both = np.concatenate([cluster, normal("other", 100, 8) + 100])
    assert precision_recall(both, cluster) == (1.0, 0.5)
    assert precision_recall(cluster, both) == (0.5, 1.0)


def test_precision_reaches_to_the_third_neighbour_and_includes_the_border() -> None:
    """Reference 0, 1, 2, 3 on a line: the ball of 0 and of 3 has radius 3, of 1 and 2 radius 2."""
    line = np.arange(4.0)[:, None]
    samples = np.array([[-3.0], [-3.01], [6.0], [6.01]])
    assert precision_recall(line, samples)[0] == 0.5


def test_precision_and_recall_do_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, samples = normal("reference", 150, 6), normal("samples", 130, 6) * 1.2
    whole = precision_recall(reference, samples)
    monkeypatch.setattr(metrics, "BLOCK_ENTRIES", 1000)
    assert precision_recall(reference, samples) == whole
    assert min(whole) > 0
    assert max(whole) < 1


def test_nearest_training_distance_is_in_pixels_of_minus_one_to_one() -> None:
    training = np.zeros((3, 2, 2, 1), np.uint8)
    images = np.stack([np.full((2, 2, 1), value, np.uint8) for value in (0, 255, 255)])
    assert nearest_training_distance(training, training) == 0
    assert nearest_training_distance(images, training) == pytest.approx(4)  # sqrt(4 pixels x 2^2)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_metrics_refuse_values_that_are_not_finite(bad: float) -> None:
    broken, whole = normal("broken", 20, 4), normal("whole", 20, 4)
    broken[3, 2] = bad
    moments = feature_moments(whole)
    for call in (
        lambda: feature_moments(broken),
        lambda: inception_score(broken),
        lambda: precision_recall(whole, broken),
        lambda: frechet_distance(broken[3], moments.covariance, *moments),
    ):
        with pytest.raises(ValueError, match="not finite"):
            call()


def test_metrics_refuse_shapes_that_do_not_fit() -> None:
    four, five = normal("four", 20, 4), normal("five", 20, 5)
    with pytest.raises(ValueError, match="at least 2 samples"):
        feature_moments(four[:1])
    with pytest.raises(ValueError, match="do not fit"):
        frechet_distance(*feature_moments(four), *feature_moments(five))
    with pytest.raises(ValueError, match="symmetric"):
        frechet_distance(four[0], np.triu(np.ones((4, 4))), *feature_moments(four))
    with pytest.raises(ValueError, match="negative"):
        frechet_distance(four[0], -np.eye(4), *feature_moments(four))
    with pytest.raises(ValueError, match="features"):
        precision_recall(four, five)
    with pytest.raises(ValueError, match="3 neighbours need more than 3"):
        precision_recall(four, four[:3])
    with pytest.raises(ValueError, match="at least one entry"):
        inception_score(four[:0])


# ------------------------------------------------------------------------------------------------- the yardstick


def test_classifier_is_accurate_and_has_features_enough() -> None:
    heldout = load_digits(heldout=True)
    features = open_extractor("digits-classifier")(to_uint8(heldout.x))
    assert (features.logits.argmax(1) == heldout.y).mean() >= 0.97
    assert features.pool.shape[1] >= 64
    assert features.spatial.shape == (360, 7 * 4 * 4)
    assert features.pool.std(0).min() > 0.1 * features.pool.std(0).max()  # none is dead


def _damaged(kind: str, strength: float) -> np.ndarray:
    x = load_digits(heldout=True).x
    if kind == "blur":
        return to_uint8(gaussian_filter(x, (0, 0, strength, strength)))
    return to_uint8(x + strength * normal("damage", *x.shape))


@pytest.mark.parametrize("reference", ["digits", "digits:heldout"])
@pytest.mark.parametrize(("kind", "strengths"), [("blur", BLUR_SIGMAS_PX), ("noise", NOISE_SIGMAS)])
def test_fid_grows_with_damage(kind: str, strengths: tuple[float, ...], reference: str) -> None:
    """Strictly, from untouched held-out digits over five strengths; so does sFID."""
    extractor = open_extractor("digits-classifier")
    real = open_reference(reference, extractor)
    scores = [score(_damaged(kind, strength), real, extractor) for strength in (0.0, *strengths)]
    for metric in ("fid", "sfid"):
        assert (np.diff([s[metric] for s in scores]) > 0).all(), (metric, scores)


def test_features_do_not_depend_on_the_batch() -> None:
    extractor = open_extractor("digits-classifier")
    images = to_uint8(load_digits(heldout=True).x[:300])
    assert np.allclose(extractor(images).pool[256:], extractor(images[256:]).pool, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 16, 16, 1), (5, 8, 8, 3), (5, 8, 8)])
def test_classifier_refuses_other_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"height, width, channels \(8, 8, 1\)"):
        open_extractor("digits-classifier")(np.zeros(shape, np.uint8))


def test_opening_the_extractor_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    open_extractor.__wrapped__("digits-classifier")
    assert torch.equal(torch.get_rng_state(), before)


def test_unknown_extractor_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'digits-classifier'"):
        open_extractor("digit-classifier")


# ------------------------------------------------------------------------------------------------- the verb


def _samples(folder: Path, num: int = 40) -> Path:
    path = folder / "samples.npz"
    write_images_npz(path, to_uint8(load_digits(heldout=True).x[:num]), np.zeros(num, np.int64))
    return path


def test_evaluation_is_written_once_with_its_protocol(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples, out = _samples(tmp_path), tmp_path / "evaluation.json"
    samples.with_suffix(".json").write_text(json.dumps({"protocol": "40 images | ddim 50 steps", "num_images": 40}))
    printed = evaluate(Recipe(), RunOptions(out), samples, "digits")
    record = json.loads(out.read_text())
    assert record["state"] == "done"
    assert record["num_images"] == 40
    assert record["reference"]["count"] == 1437
    assert record["fid"] == printed["fid"] > 0
    assert 0 < record["precision"] <= 1
    assert record["protocol"].startswith(f"digits-classifier {record['features']['hash'][:8]}, k 3")
    assert record["protocol"].endswith(
        "digits " + record["reference"]["hash"][:8] + " 1437 | 40 images | ddim 50 steps"
    )
    before = out.read_bytes()
    assert evaluate(Recipe(), RunOptions(out), samples, "digits") == printed
    assert out.read_bytes() == before
    assert "finished" in capsys.readouterr().err
    with pytest.raises(UserError, match="another recipe"):
        evaluate(Recipe(), RunOptions(out), samples, "digits:heldout")


def test_real_digits_score_as_samples_do(tmp_path: Path) -> None:
    out = tmp_path / "real.json"
    real = evaluate(Recipe(), RunOptions(out), Path("digits:heldout"), "digits")
    assert real["protocol"].endswith("360 images | real")
    assert real["fid"] < 5
    assert real["nearest_reference_distance"] > 1
    same = evaluate(Recipe(), RunOptions(tmp_path / "same.json"), Path("digits"), "digits")
    assert same["fid"] == pytest.approx(0, abs=1e-9)
    assert (same["precision"], same["recall"]) == (1.0, 1.0)


def test_evaluation_refuses_what_gives_no_number(tmp_path: Path) -> None:
    out = tmp_path / "evaluation.json"
    cases = {
        "need at least 4": (_samples(tmp_path / "few", 3), "digits"),
        "no such file": (tmp_path / "none.npz", "digits"),
        "no images at 'nonsense'": (_samples(tmp_path / "a"), "nonsense"),
    }
    mismatched = _samples(tmp_path / "b")
    mismatched.with_suffix(".json").write_text(json.dumps({"protocol": "x", "num_images": 41}))
    cases["41 images, .* holds 40: they do not belong together"] = (mismatched, "digits")
    for message, (samples, reference) in cases.items():
        with pytest.raises(UserError, match=message):
            evaluate(Recipe(), RunOptions(out), samples, reference)
    assert not out.exists()


def test_records_of_sample_are_trusted_for_their_own_images_alone(tmp_path: Path) -> None:
    images, options = to_uint8(load_digits(heldout=True).x[:40]), RunOptions(tmp_path / "e.json", dry_run=True)
    samples, labels = tmp_path / "x.npz", np.zeros(40, np.int64)
    write_samples(samples, images, labels, {"protocol": "40 images | told", "num_images": 40})
    assert evaluate(Recipe(), options, samples, "digits")["protocol"].endswith("40 images | told")
    write_images_npz(samples, images[::-1], labels)
    with pytest.raises(UserError, match="other images than .* holds: they do not belong together"):
        evaluate(Recipe(), options, samples, "digits")


# ------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize(
    ("step", "batch_size", "first", "num"), [(0, 5, 0, 5), (1, 300, 7, 200), (9, 40, 0, 40), (1, 720, 0, 720)]
)
def test_batches_are_the_shuffled_epochs_end_to_end(step: int, batch_size: int, first: int, num: int) -> None:
    images, randomness = load_digits(heldout=True), Randomness(3)
    source = ShuffledBatches(images, randomness, torch.device("cpu"))
    batch = source(step, batch_size, randomness.at(step, first, num))
    orders = np.concatenate([randomness.permutation("epoch", epoch, len(images)) for epoch in range(5)])
    rows = orders[step * batch_size + first :][:num]
    assert np.array_equal(batch.x.numpy(), images.x[rows]) and np.array_equal(batch.y.numpy(), images.y[rows])


# ------------------------------------------------------------------------------------------------- image files


def test_images_survive_the_npz(tmp_path: Path) -> None:
    images, labels = to_uint8(load_digits().x[:7]), load_digits().y[:7]
    write_images_npz(tmp_path / "x.npz", images, labels)
    read, read_labels = read_images_npz(tmp_path / "x.npz")
    assert np.array_equal(read, images)
    assert read_labels is not None
    assert np.array_equal(read_labels, labels)
    assert [p.name for p in tmp_path.iterdir()] == ["x.npz"]
    write_images_npz(tmp_path / "y.npz", images)
    assert read_images_npz(tmp_path / "y.npz")[1] is None


GOOD = np.zeros((4, 8, 8, 1), np.uint8)
BAD_NPZ: dict[str, dict[str, Any]] = {
    "wanted images in arr_0": {"images": GOOD},
    "arr_0 is int64": {"arr_0": GOOD.astype(np.int64)},
    r"arr_0 is \(4, 8, 8\)": {"arr_0": GOOD[..., 0]},
    r"arr_0 is \(0, 8, 8, 1\)": {"arr_0": GOOD[:0]},
    "values that are not finite": {"arr_0": np.full((4, 8, 8, 1), np.nan)},
    r"labels in arr_1 are \(4,\) integers": {"arr_0": GOOD, "arr_1": np.zeros(3, np.int64)},
    "labels are 0 or more": {"arr_0": GOOD, "arr_1": np.full(4, -1)},
    "plain arrays": {"arr_0": np.array([{"an": "object"}], dtype=object)},
}


@pytest.mark.parametrize("message", BAD_NPZ)
def test_bad_npz_is_an_error_for_people(message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **BAD_NPZ[message])
    with pytest.raises(UserError, match=message):
        read_images_npz(tmp_path / "x.npz")


def test_foreign_and_truncated_files_are_errors_for_people(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    write_images_npz(path, GOOD)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="cut short"):
        read_images_npz(path)
    np.save(tmp_path / "y.npy", GOOD)
    with pytest.raises(UserError, match="not an npz"):
        read_images_npz(tmp_path / "y.npy")


def test_damage_inside_a_compressed_npz_is_an_error_for_people(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez_compressed(path, arr_0=Randomness(0).at(0, 0, 4).words("x", 8 * 8).astype(np.uint8).reshape(4, 8, 8, 1))
    with zipfile.ZipFile(path) as archive:
        begin = archive.getinfo("arr_0.npy").header_offset + 60
    content = bytearray(path.read_bytes())
    content[begin : begin + 40] = b"\xff" * 40
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read as an npz"):
        read_images_npz(path)


def test_folder_of_pngs_is_read_by_name(tmp_path: Path) -> None:
    for i in (2, 0, 1):
        Image.fromarray(np.full((8, 8), 10 * i, np.uint8)).save(tmp_path / f"{i}.png")
    assert read_image_folder(tmp_path)[:, 0, 0, 0].tolist() == [0, 10, 20]
    assert read_image_folder(tmp_path).shape == (3, 8, 8, 1)
    Image.fromarray(np.zeros((8, 9), np.uint8)).save(tmp_path / "3.png")
    with pytest.raises(UserError, match="differ in size"):
        read_image_folder(tmp_path)


def test_bad_folders_are_errors_for_people(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        read_image_folder(tmp_path / "none")
    with pytest.raises(UserError, match=r"no \.png files"):
        read_image_folder(tmp_path)
    Image.fromarray(np.zeros((8, 8, 4), np.uint8)).save(tmp_path / "0.png")
    with pytest.raises(UserError, match="without transparency"):
        read_image_folder(tmp_path)
    (tmp_path / "0.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="cannot be read as a PNG"):
        read_image_folder(tmp_path)


def test_grid_shows_every_image_where_it_belongs(tmp_path: Path) -> None:
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 1), np.uint8)
    grid = image_grid(images, 3)
    assert grid.shape == (17, 26, 1)
    assert [grid[0, 0, 0], grid[0, 9, 0], grid[9, 9, 0], grid[9, 18, 0]] == [0, 1, 4, 255]
    write_grid_png(tmp_path / "grid.png", images, 3, scale=4)
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (104, 68)
        assert picture.getpixel((36, 0)) == 1
