"""Order of the images, batches made ahead, and draws: functions of their address, whatever the rest does."""

from __future__ import annotations

import bisect
import gc
import hashlib
import io
import itertools
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tinyfusion.config.recipe import DataSection, Recipe
from tinyfusion.core.ahead import Ahead
from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Randomness
from tinyfusion.data.batches import Batches, ShuffledBatches
from tinyfusion.data.digits import ImageSet
from tinyfusion.data.stream import StreamedBatches, open_shards
from tinyfusion.jobs.assemble import batches_for, image_set
from tinyfusion.models.checkpoint import new_model

CPU = torch.device("cpu")
NUM = 53


def encoded(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(stream, format="PNG")
    return stream.getvalue()


def numbered(num: int = NUM) -> list[np.ndarray]:
    """2 x 2 colour pictures that differ: the first value is their number."""
    pictures = np.full((num, 2, 2, 3), 100, np.uint8)
    pictures[:, 0, 0] = np.arange(num)[:, None]
    return list(pictures)


def put(path: Path, pictures: list[np.ndarray], group: int = 4, labels: list[Any] | None = None) -> Path:
    values = labels or [int(p[0, 0, 0]) % 7 for p in pictures]
    pq.write_table(pa.table({"img": [encoded(p) for p in pictures], "label": values}), path, row_group_size=group)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """53 images in three files, row groups of 4, 5 and 7, each file's last one shorter."""
    path, pictures = tmp_path_factory.mktemp("set"), numbered()
    for name, begin, end, group in (("a", 0, 18, 4), ("b", 18, 41, 5), ("c", 41, NUM, 7)):
        put(path / f"{name}.parquet", pictures[begin:end], group)
    return path


def streamed(folder: Path, window: int = 12, seed: int = 1, **more: float) -> StreamedBatches:
    return StreamedBatches(open_shards(folder, None, 3), Randomness(seed), CPU, window, **more)


def source_of(kind: str, folder: Path, seed: int = 1) -> Batches:
    if kind == "stream":
        return streamed(folder, seed=seed)
    x = np.stack(numbered()).astype(np.float32).transpose(0, 3, 1, 2) / 127.5 - 1.0
    return ShuffledBatches(ImageSet("numbered", x, np.arange(NUM) % 7, 7), Randomness(seed), CPU)


def identities(x: torch.Tensor) -> list[int]:
    return ((x[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def sequence(source: Batches, num: int, batch: int, world: int = 1) -> list[int]:
    """The first `num` images and a few, in batches of which `world` processes take their slices."""
    found: list[int] = []
    for step in range(-(-num // batch)):
        ends = [batch * i // world for i in range(world + 1)]
        for first, end in zip(ends[:-1], ends[1:], strict=True):
            made = source(step, batch, source.randomness.at(step, first, end - first))
            assert made.x.shape == (end - first, 3, 2, 2) and made.x.dtype == torch.float32
            assert made.condition["labels"].tolist() == [i % 7 for i in identities(made.x)]
            found += identities(made.x)
    return found[:num]


@pytest.mark.parametrize("kind", ["memory", "stream"])
def test_every_image_once_per_epoch_in_an_order_of_its_own(kind: str, folder: Path) -> None:
    source = source_of(kind, folder)
    assert len(source) == NUM and source.classes == 7
    shown = sequence(source, 4 * NUM, 8)
    epochs = [shown[begin : begin + NUM] for begin in range(0, len(shown), NUM)]
    assert all(sorted(epoch) == list(range(NUM)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert sequence(source_of(kind, folder, seed=2), NUM, 8) != epochs[0]


@pytest.mark.parametrize("kind", ["memory", "stream"])
@pytest.mark.parametrize(("batch", "world"), [(1, 1), (5, 2), (12, 4), (53, 3), (130, 1), (130, 7)])
def test_batch_size_and_processes_do_not_touch_the_sequence(kind: str, batch: int, world: int, folder: Path) -> None:
    wanted = sequence(source_of(kind, folder), 3 * NUM, 8)
    assert sequence(source_of(kind, folder), 3 * NUM, batch, world) == wanted


@pytest.mark.parametrize("window", [1, 7, 12, 20, 1000])
def test_windows_of_any_size_show_every_image_once(folder: Path, window: int) -> None:
    shown = sequence(streamed(folder, window), 2 * NUM, 9)
    assert sorted(shown[:NUM]) == sorted(shown[NUM:]) == list(range(NUM))


def test_a_window_mixes_its_row_groups_and_the_epoch_its_windows(folder: Path) -> None:
    source = streamed(folder, 21)
    starts = [0, 4, 8, 12, 16, 18, 23, 28, 33, 38, 41, 48]
    shown = [bisect.bisect_right(starts, i) for i in sequence(source, 2 * NUM, NUM)]  # row groups
    first = len(source._sequence.window(0).rows)
    assert len(set(shown[:first])) == 3 and set(shown[:first]).isdisjoint(shown[first:NUM])
    assert sum(a != b for a, b in itertools.pairwise(shown[:first])) > 5, "row groups came one after the other"
    assert set(shown[:first]) != set(shown[NUM : NUM + first])


def test_a_resumed_stream_begins_anywhere(folder: Path) -> None:
    shown = sequence(streamed(folder), 3 * NUM, 6)
    for step in (11, 3, 25, 0):
        source = streamed(folder)
        made = source(step, 6, Randomness(1).at(step, 0, 6))
        assert identities(made.x) == shown[step * 6 : step * 6 + 6]


def test_at_most_two_windows_are_in_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, most = streamed(folder, 7), 0
    read = source._sequence.window
    monkeypatch.setattr(source._windows, "make", lambda number: read(number))
    for step in range(40):
        source(step, 5, Randomness(1).at(step, 0, 5))
        time.sleep(0.001)
        made = list(source._windows._made.values())
        most = max(most, sum(len(w.rows) for w in made) + len(source._current[1].rows))  # type: ignore[index, union-attr]
    assert 7 < most <= 14


def test_a_streamed_set_is_the_set_in_memory(folder: Path) -> None:
    whole = image_set(f"parquet:{folder}")
    made = streamed(folder)(0, NUM, Randomness(1).at(0, 0, NUM))
    order = np.argsort(identities(made.x))
    assert np.array_equal(made.x.numpy()[order], whole.x) and np.array_equal(
        made.condition["labels"].numpy()[order], whole.y
    )


def test_flips_and_jitter_are_those_of_a_set_in_memory(folder: Path) -> None:
    draws = Randomness(1).at(2, 3, 9)
    plain, changed = streamed(folder)(2, 12, draws), streamed(folder, augment=0.5, flip=0.5)(2, 12, draws)
    again = ShuffledBatches(
        ImageSet("x", plain.x.numpy(), plain.condition["labels"].numpy(), 7), Randomness(1), CPU, 0.5, 0.5
    )
    again.rows = lambda first, num: (plain.x, plain.condition["labels"])  # type: ignore[method-assign]
    assert torch.equal(changed.x, again(2, 12, draws).x) and not torch.equal(changed.x, plain.x)


def test_damage_in_the_middle_is_told_at_its_step(tmp_path: Path) -> None:
    file = put(tmp_path / "a.parquet", numbered(40), 4)
    content = bytearray(file.read_bytes())
    part = pq.ParquetFile(file).metadata.row_group(7).column(0)
    begin = part.dictionary_page_offset or part.data_page_offset
    content[begin : begin + part.total_compressed_size] = b"\xff" * part.total_compressed_size
    file.write_bytes(content)
    source, came = streamed(file, 4), list[int]()

    def train() -> None:
        for step in range(10):
            came.extend(identities(source(step, 4, Randomness(1).at(step, 0, 4)).x))

    with pytest.raises(UserError, match=r"a\.parquet, row group 7 cannot be read") as caught:
        train()
    order = Randomness(1).permutation("epoch/row-groups", 0, 10).tolist()
    assert "\n" not in str(caught.value) and 0 < len(came) == 4 * order.index(7)


def test_a_damaged_picture_names_file_group_and_row(tmp_path: Path) -> None:
    rows = [encoded(p) for p in numbered(10)]
    rows[6] = b"no picture"
    pq.write_table(pa.table({"img": rows, "label": [0] * 10}), tmp_path / "a.parquet", row_group_size=4)
    with pytest.raises(UserError, match=r"a\.parquet, row group 1, row 6 cannot be decoded"):
        sequence(streamed(tmp_path), 10, 10)


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    source = streamed(put(tmp_path / "a.parquet", numbered(20)), 4)
    put(tmp_path / "a.parquet", numbered(19))
    with pytest.raises(UserError, match=r"a\.parquet has changed since it was opened: it had 20 rows"):
        source(0, 4, Randomness(1).at(0, 0, 4))
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        source(3, 4, Randomness(1).at(3, 0, 4))


def test_grey_and_size(tmp_path: Path) -> None:
    mixed = [p if i % 2 else p[..., :1] for i, p in enumerate(numbered(6))]
    file = put(tmp_path / "a.parquet", mixed)
    assert open_shards(file, None, 3).shape == (3, 2, 2)
    made = streamed(file)(0, 6, Randomness(1).at(0, 0, 6))
    assert sorted(identities(made.x)) == list(range(6))
    grey = StreamedBatches(open_shards(file, None, 1), Randomness(1), CPU, 8)
    with pytest.raises(UserError, match=r"row [135] is in colour"):
        grey.rows(0, 6)
    assert open_shards(file, 1, 3).shape == (3, 1, 1)
    odd = put(tmp_path / "b.parquet", [*numbered(3), np.zeros((3, 3, 3), np.uint8)])
    with pytest.raises(UserError, match=r"row 3: images differ in size: the first is \(2, 2\), this one \(3, 3\)"):
        streamed(odd).rows(0, 4)


@pytest.mark.parametrize(
    ("labels", "part"),
    [([0, -1], "row 1: wanted a label"), ([0, None], "row 1: wanted a label"), ([0, 9], "10 classes")],
)
def test_labels_are_checked_before_anything_runs(tmp_path: Path, labels: list[Any], part: str) -> None:
    file = put(tmp_path / "a.parquet", numbered(2), labels=labels)
    with pytest.raises(UserError, match=part):
        batches(f"parquet-stream:{file}")


def batches(name: str, side: int = 2) -> Batches:
    sizes = dict(input_size=side, patch_size=1, in_channels=3, hidden_size=16, depth=1, num_heads=2, num_classes=7)
    return batches_for(Recipe(data=DataSection(name=name, window_images=10)), new_model("dit", sizes, 0), CPU)


def test_the_data_set_by_name(folder: Path, tmp_path: Path) -> None:
    made = batches(f"parquet-stream:{folder}")
    assert isinstance(made, StreamedBatches) and len(made) == NUM
    with pytest.raises(UserError, match=r"images \(3, 2, 2\), the model takes \(3, 4, 4\)"):
        batches(f"parquet-stream:{folder}", 4)
    with pytest.raises(UserError, match="is streamed"):
        image_set(f"parquet-stream:{folder}")
    with pytest.raises(UserError, match="no parquet data"):
        batches(f"parquet-stream:{tmp_path}")


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_ahead_gives_what_the_function_gives_in_any_order(depth: int) -> None:
    with Ahead(lambda step: step * step, depth, end=10) as ahead:
        for step in (0, 1, 2, 2, 7, 8, 9, 12, 3, 4):
            assert ahead.take(step) == step * step


def test_ahead_makes_the_next_ones_and_no_more() -> None:
    made: list[int] = []
    with Ahead(lambda step: made.append(step), 2, end=6) as ahead:
        ahead.take(0)
        time.sleep(0.05)
        assert made == [0, 1, 2]
        for step in range(1, 6):
            ahead.take(step)
        time.sleep(0.05)
    assert made == [0, 1, 2, 3, 4, 5] and ahead._thread is not None and not ahead._thread.is_alive()


def test_a_stream_that_nobody_has_any_more_ends_its_thread(folder: Path) -> None:
    source = streamed(folder)
    source.rows(0, 3)
    thread = source._windows._thread
    assert thread is not None and thread.is_alive()
    del source
    gc.collect()
    assert not thread.is_alive()


def test_waiting_is_measured_and_overlaps() -> None:
    def slow(step: int) -> int:
        time.sleep(0.03)
        return step

    waited = {}
    for depth in (0, 2):
        with Ahead(slow, depth) as ahead:
            for step in range(6):
                ahead.take(step)
                time.sleep(0.06)
        waited[depth] = ahead.waited_s
    assert waited[0] >= 0.17 and waited[2] < 0.7 * waited[0]


@pytest.mark.parametrize("depth", [0, 2])
def test_an_error_comes_at_its_step_with_where_it_was_raised(depth: int) -> None:
    def faulty_maker(step: int) -> int:
        return 1 // (step - 2)

    with Ahead(faulty_maker, depth) as ahead:
        assert [ahead.take(0), ahead.take(1)] == [-1, -1]
        with pytest.raises(ZeroDivisionError) as caught:
            ahead.take(2)
        assert "faulty_maker" in "".join(traceback.format_tb(caught.value.__traceback__))
        assert ahead.take(3) == 1


def test_its_own_thread_may_close_it() -> None:
    """The collector lets go of an owner on whatever thread it runs."""
    closed: list[int] = []

    def make(step: int) -> int:
        ahead.close()
        closed.append(step)
        return step

    ahead = Ahead(make, 1, timeout_s=0.5)
    with pytest.raises(UserError):
        ahead.take(0)
    assert closed == [0]


def test_what_never_comes_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyfusion.core.ahead._CLOSING_S", 0.05)
    release = threading.Event()
    began = time.perf_counter()
    ahead = Ahead(lambda step: release.wait(20), 1, timeout_s=0.1)
    with ahead, pytest.raises(UserError, match=r"the data of step 4 did not come within 0\.1 s"):
        ahead.take(4)
    assert time.perf_counter() - began < 5
    release.set()
    with pytest.raises(RuntimeError, match="closed"):
        ahead.take(5)


def test_batches_made_ahead_are_those_made_in_turn(folder: Path) -> None:
    source = streamed(folder, augment=0.5, flip=0.5)

    def make(step: int) -> torch.Tensor:
        return source(step, 8, Randomness(1).at(step, 0, 8)).x

    in_turn = [make(step) for step in range(12)]
    with Ahead(make, 2) as ahead:
        assert all(torch.equal(ahead.take(step), in_turn[step]) for step in range(12))


PINNED = {
    "uniform": "c7049b1a8208c57b",
    "normal": "ff65d04f9905c25d",
    "gumbel": "aaeaef2a791dd0ce",
    "integers": "18b159d69332f218",
}


@pytest.mark.parametrize("kind", PINNED)
def test_draws_keep_their_values(kind: str) -> None:
    draws = Randomness(11).at(5, 3, 4)
    values = draws.integers("pinned", 1000, (3,)) if kind == "integers" else getattr(draws, kind)("pinned", (3,))
    assert hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()[:16] == PINNED[kind]


def test_uniforms_are_the_upper_bits_of_the_words() -> None:
    draws = Randomness(2**63).at(9, 2**33, 37)
    words = draws.words("u", 1001)
    assert np.array_equal(draws.uniform("u", (7, 143)).reshape(37, -1), ((words >> np.uint64(11)) + 0.5) * 2.0**-53)
