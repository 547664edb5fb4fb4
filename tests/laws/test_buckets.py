"""Buckets: which one a picture belongs to, and batches of one bucket each: exact, addressed, the same for any split of a step."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tinyfusion.conditioning.texts import text_table
from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Randomness
from tinyfusion.data.buckets import (
    BucketBatches,
    facts_folder,
    is_bucketed,
    nearest_bucket,
    open_buckets,
    parse_size,
    write_bucket_manifest,
)
from tinyfusion.data.latents import LatentSpec, encoded_values, open_latents, unfinished_shard, write_manifest
from tinyfusion.data.picture import centre_crop, decode, size_of

NUMS = {"bucket-8x8": 7, "bucket-8x16": 3, "bucket-16x8": 1}
TOTAL = sum(NUMS.values())


def made(folder: Path, nums: dict[str, int] = NUMS, **changes: object) -> Path:
    """Buckets of latents whose every value is the number of their image, which is its label too."""
    first = 0
    for name, num in nums.items():
        height, width = parse_size(name.removeprefix("bucket-"), "")
        values = dict(
            num_images=num, shard_images=2, kind="samples", dtype="float32", rows=1, classes=TOTAL, scale=1.0, shift=0.0
        )
        spec = LatentSpec(**{**values, "shape": (2, height // 8, width // 8), **changes})  # type: ignore[arg-type]
        (folder / name).mkdir(parents=True)
        numbers = np.arange(first, first + num)
        for shard in range(spec.shards):
            begin, count = spec.bounds(shard)
            own = numbers[begin : begin + count]
            stored = torch.from_numpy(own).float().view(-1, 1, 1, 1, 1).expand(-1, *spec.values)
            with unfinished_shard(folder / name, spec, shard, own, 0) as append:
                append(encoded_values(stored, "float32"))
        write_manifest(folder / name, spec, {})
        first += num
    write_bucket_manifest(folder, nums, {})
    return folder


def batches(folder: Path, seed: int = 3) -> BucketBatches:
    rows = torch.arange(TOTAL + 1).float()
    table = text_table({"embeddings": rows.view(-1, 1, 1).repeat(1, 2, 3).bfloat16(), "pooled": rows.view(-1, 1)})
    return BucketBatches(open_buckets(folder), Randomness(seed), torch.device("cpu")).conditioned_on(table)


def images(source: BucketBatches, step: int, size: int, slices: int = 1) -> list[int]:
    """The numbers of the images of a step, taken in some slices."""
    numbers: list[int] = []
    for k in range(slices):
        draws = Randomness(3).at(step, k * size // slices, size // slices)
        batch = source(step, size, draws)
        assert batch.condition["embeddings"].dtype == torch.bfloat16
        own = batch.x.flatten(1)[:, 0].int().tolist()
        assert batch.condition["pooled"].flatten().int().tolist() == own, "an image has the row of its label"
        numbers += own
    return numbers


def bucket_of(number: int) -> int:
    return int(np.searchsorted(np.cumsum(list(NUMS.values())), number, side="right"))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 12])
def test_batches_are_of_one_bucket_and_no_image_comes_before_all_others_have(tmp_path: Path, size: int) -> None:
    source = batches(made(tmp_path))
    seen, steps = Counter[int](), 40 * TOTAL // size
    for step in range(steps):
        numbers = images(source, step, size)
        assert len({bucket_of(number) for number in numbers}) == 1, "one bucket"
        seen.update(numbers)
        for bucket in range(len(NUMS)):
            counts = [seen[number] for number in range(TOTAL) if bucket_of(number) == bucket]
            assert max(counts) - min(counts) <= 1, "in turns"
    # after whole epochs every bucket has had its share, up to a batch
    epochs = steps * size / TOTAL
    for bucket, num in enumerate(NUMS.values()):
        total = sum(count for number, count in seen.items() if bucket_of(number) == bucket)
        assert abs(total - epochs * num) <= len(NUMS) * size + num


def test_an_epoch_of_full_buckets_has_every_image_once(tmp_path: Path) -> None:
    source = batches(made(tmp_path, {"bucket-8x8": 4, "bucket-8x16": 2, "bucket-16x8": 4}))
    for epoch in range(3):
        numbers = [number for step in range(5) for number in images(source, 5 * epoch + step, 2)]
        assert sorted(numbers) == list(range(10))


def test_slices_of_a_step_and_any_order_of_steps_give_the_same(tmp_path: Path) -> None:
    folder = made(tmp_path)
    whole = [images(batches(folder), step, 4) for step in range(20)]
    source = batches(folder)
    assert [images(source, step, 4, slices=4) for step in reversed(range(20))] == whole[::-1]
    assert [images(batches(folder, seed=4), step, 4) for step in range(20)] != whole


def test_rows_are_of_the_largest_bucket(tmp_path: Path) -> None:
    source = batches(made(tmp_path))
    x, labels = source.rows(0, 5)
    assert (x.shape, source.shape, len(source), source.classes) == ((5, 2, 1, 1), (2, 1, 1), TOTAL, TOTAL)
    assert {bucket_of(int(label)) for label in labels} == {0}


def test_a_set_says_whether_it_has_buckets(tmp_path: Path) -> None:
    made(tmp_path)
    assert is_bucketed(tmp_path) and not is_bucketed(tmp_path / "bucket-8x8") and not is_bucketed(tmp_path / "none")
    assert facts_folder(tmp_path) == tmp_path / "bucket-8x8"
    assert facts_folder(tmp_path / "bucket-8x16") == tmp_path / "bucket-8x16"


def test_damaged_sets_are_refused(tmp_path: Path) -> None:
    made(tmp_path / "a")
    write_bucket_manifest(tmp_path / "a", {**NUMS, "bucket-8x8": 6}, {})
    with pytest.raises(UserError, match="bucket-8x8 has 7 images, not 6"):
        open_buckets(tmp_path / "a")
    for names in ({"../x": 7}, {}, {"bucket-8x8x8": 7}):
        write_bucket_manifest(tmp_path / "a", names, {})
        with pytest.raises(UserError, match="no list of different folders"):
            open_buckets(tmp_path / "a")
    made(tmp_path / "b", {"bucket-8x8": 2})
    made(tmp_path / "c", {"bucket-8x16": 2}, shift=0.5)
    (tmp_path / "c" / "bucket-8x16").rename(tmp_path / "b" / "bucket-8x16")
    write_bucket_manifest(tmp_path / "b", {"bucket-8x8": 2, "bucket-8x16": 2}, {})
    with pytest.raises(UserError, match="of other autoencoders or settings"):
        open_buckets(tmp_path / "b")


# ------------------------------------------------------------------------------------------------------------- pictures


SIZES = [(1024, 1024), (832, 1216), (1216, 832), (512, 512)]


@pytest.mark.parametrize(
    ("picture", "wanted"),
    [
        ((3000, 3000), 0), ((700, 700), 3), ((100, 100), 3), ((1200, 1800), 1), ((1800, 1200), 2), ((10, 5000), 1),
        ((1024, 1100), 0), ((1024, 1300), 1), ((1023, 1024), 3),
    ],
)  # fmt: skip
def test_a_picture_belongs_to_the_nearest_aspect_ratio(picture: tuple[int, int], wanted: int) -> None:
    assert nearest_bucket(picture, SIZES) == wanted


@pytest.mark.parametrize("text", ["", "5", "5x", "0x5", "5x0", "5x5x5", "-5x5", "5 x 5", "70000x5", "axb"])
def test_sizes_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="HEIGHTxWIDTH"):
        parse_size(text, "encode.sizes")


@pytest.mark.parametrize("size", [(24, 16), (16, 24), (8, 40), (60, 60)])
def test_a_crop_covers_the_size_and_is_centred(size: tuple[int, int]) -> None:
    """Of a picture whose columns and rows count, the crop is the middle, at the scale at which it just covers the size."""
    height, width = 90, 120
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    picture = Image.fromarray(np.stack([rows, columns, rows], -1).astype(np.uint8))
    cropped = np.asarray(centre_crop(picture, size)).astype(float)
    assert cropped.shape == (*size, 3)
    scale = max(size[0] / height, size[1] / width)
    for axis, (side, whole) in enumerate(zip(size, (height, width), strict=True)):
        line = cropped[:, :, axis].mean(1 - axis)
        assert abs(line.mean() - (whole - 1) / 2) < 1.5
        if side > 2:
            assert abs((line[-2] - line[1]) / (side - 3) - 1 / scale) < 0.05 + 1 / (side - 3)  # 8 bits


@pytest.mark.parametrize("tag", range(1, 9))
def test_the_size_in_a_header_is_that_of_the_decoded_picture(tag: int) -> None:
    stream, exif = io.BytesIO(), Image.Exif()
    exif[274] = tag
    Image.new("RGB", (5, 3)).save(stream, "JPEG", exif=exif)
    for orientation in ("follow", "ignore"):
        decoded = decode(stream.getvalue(), "", None, orientation)  # type: ignore[arg-type]
        assert size_of(stream.getvalue(), "", orientation) == decoded.pixels.shape[:2]  # type: ignore[arg-type]


def test_videos_are_stored_with_their_frames(tmp_path: Path) -> None:
    spec = LatentSpec(2, 2, "moments", "float32", 1, (2, 3, 4, 5), 2, 1.0, 0.0)
    stored = torch.arange(2 * 4 * 3 * 4 * 5).float().view(2, 1, 4, 3, 4, 5)
    with unfinished_shard(tmp_path, spec, 0, np.arange(2), 0) as append:
        append(encoded_values(stored, "float32"))
    write_manifest(tmp_path, spec, {})
    opened = open_latents(tmp_path)
    assert opened.spec == spec
    assert torch.equal(opened.gather(np.array([1, 0]), np.zeros(2, bool)), stored[[1, 0], 0])


# ------------------------------------------------------------------------------------------------------------ processes


def test_processes_of_encode_have_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    from tinyfusion.config.recipe import Recipe
    from tinyfusion.jobs import assemble

    monkeypatch.setattr(assemble, "choose_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    recipe = Recipe(device="cuda")
    assert assemble.own_device(recipe) == torch.device("cuda")
    for name, value in (("WORLD_SIZE", "4"), ("RANK", "3"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert assemble.own_device(recipe) == torch.device("cuda", 1)
    assert assemble.own_device(Recipe(device="cpu")) == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="process 2 of this machine has no GPU: there are 2"):
        assemble.own_device(recipe)


@pytest.mark.parametrize(("rows", "chunks"), [(1, 1), (16, 1), (17, 2), (1024, 64), (1025, 33), (10**6, 7813)])
def test_small_files_of_prompts_have_chunks_for_every_process(rows: int, chunks: int) -> None:
    from tinyfusion.data.prompts import PromptFile

    file = PromptFile(Path(), rows)
    assert file.num_chunks == chunks
    assert [row for k in range(chunks) for row in file.bounds(k)] == list(range(rows))
