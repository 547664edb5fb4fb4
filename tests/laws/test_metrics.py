"""Metrics against closed forms, the yardstick against known damage, image files against bad input."""

from __future__ import annotations

import json
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from scipy.ndimage import gaussian_filter

from tinyfusion.commands.evaluate import evaluate
from tinyfusion.config.recipe import Recipe
from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Randomness
from tinyfusion.data.batches import ShuffledBatches
from tinyfusion.data.digits import load_digits
from tinyfusion.data.image_source import source_of, stream_images_npz
from tinyfusion.data.images import image_grid, read_images_npz, write_grid_png
from tinyfusion.evaluate import metrics
from tinyfusion.evaluate.extractors import open_extractor
from tinyfusion.evaluate.features import Features
from tinyfusion.evaluate.fidelity import psnr_db, ssim
from tinyfusion.evaluate.metrics import (
    Moments,
    RunningMoments,
    RunningScore,
    feature_moments,
    frechet_distance,
    inception_score,
    nearest_training_distance,
    precision_recall,
    summarise,
)
from tinyfusion.jobs.assemble import RunOptions, _decoded_once
from tinyfusion.jobs.drawn_output import write_samples
from tinyfusion.jobs.scoring import open_images, open_reference, score

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


def by_matrix_root(first: Moments, second: Moments) -> float:
    """The published computation, with scipy's root of a general matrix."""
    difference = first.mean - second.mean
    root = sqrtm(first.covariance @ second.covariance)
    return float(difference @ difference + np.trace(first.covariance + second.covariance - 2 * root.real))


@pytest.mark.parametrize("decay", [0.0, 4.0])
def test_frechet_distance_agrees_with_the_root_of_a_general_matrix(decay: float) -> None:
    """To 1e-6, also for spectra over four decades and correlated features."""
    mix = normal("mix", 60, 60) * np.exp(-decay * np.linspace(0, 1, 60))
    first = feature_moments(normal("first", 900, 60) @ mix.T)
    second = feature_moments(1.1 * normal("second", 700, 60) @ (mix + 0.1).T + 0.05)
    assert frechet_distance(*first, *second) == pytest.approx(by_matrix_root(first, second), rel=1e-6)


@pytest.mark.parametrize(("num1", "num2"), [(20, 30), (20, 400), (2, 2)])
def test_frechet_distance_of_few_samples_is_that_of_their_gram_matrix(num1: int, num2: int) -> None:
    """With factors F of samples (N < D), tr (S1 S2)^(1/2) is the nuclear norm of F1 F2^T, of N1 x N2 entries."""
    first, second = normal("first", num1, 64), 2 * normal("second", num2, 64) + 1
    one, two = feature_moments(first), feature_moments(second)
    factors = [(x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (first, second)]
    nuclear = np.linalg.svd(factors[0] @ factors[1].T, compute_uv=False).sum()
    traces = np.trace(one.covariance) + np.trace(two.covariance)
    expected = ((one.mean - two.mean) ** 2).sum() + traces - 2 * nuclear
    assert frechet_distance(*one, *two) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_features_that_share_nothing_is_that_of_the_parts() -> None:
    """Ranges at right angles: the root vanishes, exactly; also where one set does not vary at all."""
    first, second = np.zeros((50, 8)), np.zeros((50, 8))
    first[:, :4], second[:, 4:] = normal("first", 50, 4), normal("second", 50, 4)
    one, two = feature_moments(first), feature_moments(second)
    expected = ((one.mean - two.mean) ** 2).sum() + np.trace(one.covariance) + np.trace(two.covariance)
    assert frechet_distance(*one, *two) == pytest.approx(expected, rel=1e-14)
    still = feature_moments(np.ones((5, 8)))
    apart = ((one.mean - 1) ** 2).sum() + np.trace(one.covariance)
    assert frechet_distance(*one, *still) == pytest.approx(apart, rel=1e-14)


def test_eigenvalues_that_rounding_reaches_are_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Singular values from the start, and where the faster way doubts itself, give one distance."""
    spectrum = np.logspace(0, -9, 40)
    basis = np.linalg.qr(normal("basis", 40, 40))[0]
    covariances = basis * spectrum @ basis.T, np.diag(spectrum[::-1])
    moments = np.zeros(40), covariances[0], np.zeros(40), covariances[1]
    careful = frechet_distance(*moments)
    monkeypatch.setattr(metrics, "_MAX_ERROR", np.inf)
    fast = frechet_distance(*moments)
    monkeypatch.setattr(metrics, "_MAX_ERROR", -1.0)
    assert frechet_distance(*moments) == pytest.approx(careful, rel=1e-9)
    assert fast == pytest.approx(careful, rel=1e-5)


# ------------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("batch", [1, 7, 100, 1000])
def test_running_moments_do_not_depend_on_the_batches(batch: int) -> None:
    features = normal("features", 300, 5) + 1e3  # a mean far away, where sums of squares would lose digits
    running = RunningMoments()
    for first in range(0, len(features), batch):
        running.add(features[first : first + batch])
    whole = feature_moments(features)
    assert np.allclose(running.moments().mean, whole.mean, rtol=1e-14)
    assert np.allclose(running.moments().covariance, whole.covariance, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_running_score_does_not_depend_on_the_batches(batch: int) -> None:
    logits = np.concatenate([normal("logits", 60, 10), np.where(np.eye(10) > 0, 0.0, -1e5)])
    running = RunningScore(30)
    for first in range(0, len(logits), batch):
        running.add(logits[first : first + batch])
    assert running.score() == pytest.approx(inception_score(logits, 30), rel=1e-12)


def test_streams_refuse_what_gives_no_number() -> None:
    def batches(*sizes: int) -> Iterator[Features]:
        return (Features(normal("pool", size, 4), None, None) for size in sizes)

    with pytest.raises(ValueError, match="more than the announced 5 images"):
        summarise(batches(3, 3), 5)
    with pytest.raises(ValueError, match="wanted 5 images; got 3"):
        summarise(batches(3), 5)
    with pytest.raises(ValueError, match="at least 2 samples"):
        summarise(batches(1), 1)
    with pytest.raises(ValueError, match="not finite"):
        RunningMoments().add(np.full((2, 3), np.nan))
    three = RunningMoments()
    three.add(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="2 features after rows of 3"):
        three.add(np.zeros((2, 2)))
    with pytest.raises(ValueError, match="at least one image"):
        RunningScore(5).score()


def test_statistics_of_a_stream_hold_features_once_and_squares_of_their_width() -> None:
    """Features in float32, and a few matrices of D x D; never a matrix of N x D in float64, nor N x N distances."""
    num, width, batch = 12_000, 128, 200
    template = normal("template", batch, width).astype(np.float32)

    def stream() -> Iterator[Features]:
        for first in range(0, num, batch):
            yield Features(template + np.float32(first), None, template[:, :40])

    tracemalloc.start()
    found = summarise(stream(), num)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.features is not None and found.features.shape == (num, width)
    kept, squares, passing = 4 * num * width, 8 * width * width, 8 * batch * width
    assert peak < 1.1 * kept + 8 * squares + 8 * passing < 8 * num * width


# ------------------------------------------------------------------------------------------------- moments


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


def test_distances_are_never_more_than_a_block_and_half_of_a_symmetric_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, samples = normal("reference", 150, 6), normal("samples", 130, 6)
    entries: list[int] = []
    compute = metrics._Points.squared_distances

    def counted(self: Any, rows: slice, other: Any, columns: slice) -> torch.Tensor:
        found = compute(self, rows, other, columns)
        entries.append(found.numel())
        return found

    monkeypatch.setattr(metrics._Points, "squared_distances", counted)
    monkeypatch.setattr(metrics, "BLOCK_ENTRIES", 100)
    precision_recall(reference, samples)
    assert max(entries) <= 100
    halves = sum(num * (num + 10) // 2 for num in (150, 130))  # blocks of 10: the diagonal ones whole
    assert sum(entries) == 150 * 130 + halves


def test_nearest_training_distance_is_in_pixels_of_minus_one_to_one() -> None:
    training = np.zeros((3, 2, 2, 1), np.uint8)
    images = np.stack([np.full((2, 2, 1), value, np.uint8) for value in (0, 255, 255)])
    assert nearest_training_distance(training, training) == 0
    assert nearest_training_distance(images, training) == pytest.approx(4)  # sqrt(4 pixels x 2^2)


# ------------------------------------------------------------------------------------------------- pairs of images


def test_psnr_of_a_constant_error_is_the_closed_form() -> None:
    left = np.full((2, 8, 8, 3), 100, np.uint8)
    right = left.copy()
    right[0] += 5
    expected = [10 * np.log10(255**2 / 25), 10 * np.log10(255**2 * 8 * 8 * 3)]  # equal images: one value by one level
    assert psnr_db(left, right) == pytest.approx(expected)
    assert psnr_db(right, left) == pytest.approx(expected)  # nothing wraps around in uint8


def test_ssim_of_flat_pictures_is_the_closed_form() -> None:
    """No structure: (2 a b + C1) / (a^2 + b^2 + C1)."""
    left, right = np.full((1, 16, 16, 1), 60, np.uint8), np.full((1, 16, 16, 1), 120, np.uint8)
    c1 = (0.01 * 255) ** 2
    assert ssim(left, right) == pytest.approx((2 * 60 * 120 + c1) / (60**2 + 120**2 + c1))


@pytest.mark.parametrize("size", [(11, 11), (13, 12), (8, 9), (1, 1)])
def test_ssim_is_the_mean_over_windows(size: tuple[int, int]) -> None:
    """Against the definition, window by window; small pictures have a smaller window."""
    rng = np.random.default_rng(0)
    left, right = rng.integers(0, 256, (2, 1, *size, 2), dtype=np.uint8)
    side = min(11, *(n if n % 2 else n - 1 for n in size))
    place = np.arange(side) - side // 2
    line = np.exp(-(place**2) / (2 * 1.5**2))
    weights = np.outer(line, line) / np.outer(line, line).sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for channel in range(2):
        for top in range(size[0] - side + 1):
            for start in range(size[1] - side + 1):
                x, y = (p[0, top : top + side, start : start + side, channel].astype(float) for p in (left, right))
                mx, my = (weights * x).sum(), (weights * y).sum()
                vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
                cov = (weights * (x - mx) * (y - my)).sum()
                values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    assert ssim(left, right)[0] == pytest.approx(np.mean(values))


def test_pairs_of_equal_images_are_perfect_and_damage_lowers_both() -> None:
    images = to_uint8(load_digits(heldout=True).x[:20])
    assert ssim(images, images) == pytest.approx(np.ones(20))
    worse = [to_uint8(load_digits(heldout=True).x[:20] + s * normal("damage", 20, 1, 8, 8)) for s in NOISE_SIGMAS]
    for measure in (psnr_db, ssim):
        assert (np.diff([measure(images, image).mean() for image in (images, *worse)]) < 0).all()
    with pytest.raises(ValueError, match="one shape"):
        ssim(images, images[:3])


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
    features = open_extractor("digits-classifier", "cpu")(to_uint8(heldout.x))
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
    extractor = open_extractor("digits-classifier", "cpu")
    real = open_reference(reference, extractor)
    scores = [score(_damaged(kind, strength), real, extractor) for strength in (0.0, *strengths)]
    for metric in ("fid", "sfid"):
        assert (np.diff([s[metric] for s in scores]) > 0).all(), (metric, scores)


def test_features_do_not_depend_on_the_batch() -> None:
    extractor = open_extractor("digits-classifier", "cpu")
    images = to_uint8(load_digits(heldout=True).x[:300])
    assert np.allclose(extractor(images).pool[256:], extractor(images[256:]).pool, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 16, 16, 1), (5, 8, 8, 3), (5, 8, 8)])
def test_classifier_refuses_other_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"height, width, channels \(8, 8, 1\)"):
        open_extractor("digits-classifier", "cpu")(np.zeros(shape, np.uint8))


def test_opening_the_extractor_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    open_extractor.__wrapped__("digits-classifier", "cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_unknown_extractor_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'digits-classifier'"):
        open_extractor("digit-classifier", "cpu")


# ------------------------------------------------------------------------------------------------- the verb


def _samples(folder: Path, num: int = 40) -> Path:
    path = folder / "samples.npz"
    folder.mkdir(exist_ok=True)
    np.savez(path, to_uint8(load_digits(heldout=True).x[:num]), np.zeros(num, np.int64))
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
    write_samples(samples, images, labels, {"protocol": "40 images | noted", "num_images": 40})
    assert evaluate(Recipe(), options, samples, "digits")["protocol"].endswith("40 images | noted")
    np.savez(samples, images[::-1], labels)
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
    assert np.array_equal(batch.x.numpy(), images.x[rows]) and np.array_equal(
        batch.condition["labels"].numpy(), images.y[rows]
    )


# ------------------------------------------------------------------------------------------------- image files


def test_images_survive_the_npz(tmp_path: Path) -> None:
    images, labels = to_uint8(load_digits().x[:7]), load_digits().y[:7]
    stream_images_npz(tmp_path / "x.npz", source_of(images), labels)
    read, read_labels = read_images_npz(tmp_path / "x.npz")
    assert np.array_equal(read, images)
    assert read_labels is not None
    assert np.array_equal(read_labels, labels)
    assert [p.name for p in tmp_path.iterdir()] == ["x.npz"]
    np.savez(tmp_path / "y.npz", images)
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
    np.savez(path, GOOD)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="truncated"):
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


def test_folder_of_pictures_is_read_by_name(tmp_path: Path) -> None:
    for i in (2, 0, 1):
        Image.fromarray(np.full((8, 8), 10 * i, np.uint8)).save(tmp_path / f"{i}.png")
    found = open_images(str(tmp_path)).array
    assert found is not None
    assert found[:, 0, 0, 0].tolist() == [0, 10, 20]
    assert found.shape == (3, 8, 8, 1)
    Image.fromarray(np.zeros((8, 9), np.uint8)).save(tmp_path / "3.png")
    _decoded_once.cache_clear()
    with pytest.raises(UserError, match="give one size for all"):
        open_images(str(tmp_path))


def test_a_large_folder_is_read_as_a_small_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = Randomness(0).at(0, 0, 5).words("x", 8 * 8 * 3).astype(np.uint8).reshape(5, 8, 8, 3)
    for i, value in enumerate(values):
        Image.fromarray(value[..., 0] if i == 3 else value).save(tmp_path / f"{i}.png")
    small = open_images(str(tmp_path))
    monkeypatch.setattr("tinyfusion.jobs.scoring.IN_MEMORY_BYTES", 10)
    large = open_images(str(tmp_path))
    assert large.array is None
    assert large.shape == small.shape == (5, 8, 8, 3)
    assert large.hash() == small.hash()
    assert [len(batch) for batch in large.read(2)] == [2, 2, 1]
    Image.new("RGB", (9, 8)).save(tmp_path / "5.png")
    with pytest.raises(UserError, match=r"5\.png is \(8, 9, 3\), and the first picture of"):
        open_images(str(tmp_path)).hash()


def test_bad_folders_are_errors_for_people(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no images at"):
        open_images(str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"holds no pictures \(\.jpg"):
        open_images(str(tmp_path))
    Image.fromarray(np.zeros((8, 8, 4), np.uint8)).save(tmp_path / "0.png")
    with pytest.raises(UserError, match="partly transparent"):
        open_images(str(tmp_path))
    (tmp_path / "0.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="cannot be decoded as a picture"):
        open_images(str(tmp_path))


def test_grid_shows_every_image_where_it_belongs(tmp_path: Path) -> None:
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 1), np.uint8)
    grid = image_grid(images, 3)
    assert grid.shape == (17, 26, 1)
    assert [grid[0, 0, 0], grid[0, 9, 0], grid[9, 9, 0], grid[9, 18, 0]] == [0, 1, 4, 255]
    write_grid_png(tmp_path / "grid.png", images, 3, scale=4)
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (104, 68)
        assert picture.getpixel((36, 0)) == 1
