"""Data sets of the hub: the files of a name, whole and streamed, with and without a hub; and refusals."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data_hub import COMMIT, CONVERSION, CONVERTED, MAIN, NEXT, DataHub, DataSet, data_hub
from huggingface_hub import constants
from PIL import Image

from tinyfusion.core.errors import UserError
from tinyfusion.core.fetching import WouldFetch, no_fetching
from tinyfusion.core.rng import Randomness
from tinyfusion.data.hub import HubSet, open_hub
from tinyfusion.data.originals import open_originals
from tinyfusion.data.stream import StreamedBatches, open_shards
from tinyfusion.jobs.assemble import _decoded_once, image_set

CPU = torch.device("cpu")
CARD = {
    "configs": [
        {
            "config_name": "plain_text",
            "data_files": [
                {"split": "train", "path": "plain_text/train-*"},
                {"split": "test", "path": ["plain_text/test-*"]},
            ],
            "default": True,
        },
        {"config_name": "small", "data_files": "small/*.parquet"},
    ]
}


def picture(i: int, side: int = 4) -> dict[str, Any]:
    stream = io.BytesIO()
    pixels = Randomness(3).at(0, i, 1).integers("pixels", 256, (side, side, 3))[0]
    Image.fromarray(pixels.astype(np.uint8)).save(stream, format="PNG")
    return {"bytes": stream.getvalue(), "path": None}


def table(first: int, num: int, image: str = "img", label: str = "label", **more: Any) -> bytes:
    """A parquet file of pictures first .. first + num - 1, in row groups of three."""
    rows = range(first, first + num)
    made = pa.table({image: [picture(i) for i in rows], label: [i % 5 for i in rows]})
    if more:
        made = made.replace_schema_metadata({"huggingface": json.dumps(more)})
    stream = io.BytesIO()
    pq.write_table(made, stream, row_group_size=3)
    return stream.getvalue()


def cifar() -> DataSet:
    train = {f"plain_text/train-0000{k}-of-00002.parquet": table(7 * k, 7) for k in range(2)}
    other = {"plain_text/test-00000-of-00001.parquet": table(20, 4), "small/a.parquet": table(0, 2), "README.md": b"-"}
    return DataSet({MAIN: {**train, **other}, "v1": {"plain_text/train-0.parquet": table(0, 3)}}, CARD)


def sets() -> dict[str, DataSet]:
    unusual = table(
        0,
        4,
        "picture",
        "species",
        info={"features": {"picture": {"_type": "Image"}, "species": {"_type": "ClassLabel"}}},
    )
    pictures = {"train/cat/1.jpg": b"x"}
    converted = {"default/train/0000.parquet": table(0, 5), "default/train/0001.parquet": table(5, 1)}
    return {
        "org/cifar": cifar(),
        "org/plain": DataSet({MAIN: {"data/train-00000-of-00001.parquet": table(0, 5), "data/my_test.parquet": table(5, 2)}}),
        "org/folders": DataSet({MAIN: {"test/0.parquet": table(0, 2), "x/valid.parquet": table(0, 1), "y.parquet": table(0, 3)}}),
        "org/jpg": DataSet({MAIN: pictures, CONVERTED: converted}),
        "org/huge": DataSet({MAIN: pictures, CONVERTED: {"default/partial-train/0000.parquet": table(0, 5)}}),
        "org/several": DataSet({MAIN: pictures, CONVERTED: {"a/train/0.parquet": table(0, 1), "b/train/0.parquet": table(0, 2)}}),
        "org/none": DataSet({MAIN: pictures, "v1": pictures}),
        "org/gated": DataSet({MAIN: {"train.parquet": table(0, 2)}}, gated=True),
        "org/unusual": DataSet({MAIN: {"train.parquet": unusual}}),
        "org/words": DataSet({MAIN: {"train.parquet": table(0, 2, "text")}}),
        "org/fine": DataSet({MAIN: {"train.parquet": table(0, 2, "image", "fine_label")}}),
    }  # fmt: skip


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DataHub]:
    """The hub that the client speaks to, and empty caches."""
    with data_hub(sets()) as made:
        monkeypatch.setattr(constants, "ENDPOINT", made.address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", made.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
        _decoded_once.cache_clear()
        yield made


def paths(found: HubSet) -> list[str]:
    return [file.path for file in found.files]


@pytest.mark.parametrize(
    ("name", "config", "split", "files"),
    [
        ("org/cifar", "plain_text", "train", ["plain_text/train-00000-of-00002.parquet", "plain_text/train-00001-of-00002.parquet"]),
        ("org/cifar:test", "plain_text", "test", ["plain_text/test-00000-of-00001.parquet"]),
        ("org/cifar:small:train", "small", "train", ["small/a.parquet"]),
        ("org/plain", "default", "train", ["data/train-00000-of-00001.parquet"]),
        ("org/plain:test", "default", "test", ["data/my_test.parquet"]),
        ("org/folders:test", "default", "test", ["test/0.parquet"]),
        ("org/folders:validation", "default", "validation", ["x/valid.parquet"]),
        ("org/folders", "default", "train", ["y.parquet"]),
        ("org/folders:x:validation", "x", "validation", ["x/valid.parquet"]),
        ("org/jpg", "default", "train", ["default/train/0000.parquet", "default/train/0001.parquet"]),
        ("org/several:b:train", "b", "train", ["b/train/0.parquet"]),
    ],
)  # fmt: skip
def test_what_a_name_stands_for(hub: DataHub, name: str, config: str, split: str, files: list[str]) -> None:
    found = open_hub(name)
    assert (found.config, found.split, paths(found)) == (config, split, files)
    assert found.commit == (CONVERSION if "jpg" in name or "several" in name else COMMIT)
    assert not hub.whole and not hub.ranges, "nothing of the content was read"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar10", "is no data set of the hub: wanted ORG/NAME"),
        ("org/absent", "no data set org/absent that may be read without logging in"),
        ("org/cifar@v9", "no revision 'v9' of org/cifar"),
        ("org/cifar:dev", "plain_text has the splits test, train, not 'dev'"),
        ("org/cifar:big:train", "the configurations plain_text, small, not 'big'"),
        ("org/several", "the configurations a, b: name one, as ORG/NAME:a:SPLIT"),
        ("org/huge", "only a part of it to parquet: download the set"),
        ("org/none", "has no parquet files, and the hub has made none of it"),
        ("org/none@v1", "at revision v1 has no parquet files: leave the revision out"),
    ],
)
def test_names_that_are_refused(hub: DataHub, name: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        open_hub(name)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_dry_run_fetches_no_files(hub: DataHub) -> None:
    """The files are opened on several threads, and the ban holds for all of them."""
    with no_fetching(), pytest.raises(WouldFetch, match="would fetch org/cifar/.* from the hub"):
        image_set("hub:org/cifar")
    assert not hub.whole and not hub.ranges


def test_a_whole_set_is_that_of_its_files_and_is_there_without_a_hub(
    hub: DataHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in sets()["org/cifar"].branches[MAIN].items():
        if "train-" in name:
            (tmp_path / Path(name).name).write_bytes(content)
    made, local = image_set("hub:org/cifar"), image_set(f"parquet:{tmp_path}")
    assert np.array_equal(made.x, local.x) and np.array_equal(made.y, local.y) and len(made) == 14
    assert f"2 files of train at commit {COMMIT[:12]}" in capsys.readouterr().err
    assert sorted(hub.whole) == sorted(paths(open_hub("org/cifar"))), "each file once, and no other"
    before = len(hub.queries)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert np.array_equal(image_set("hub:org/cifar").x, made.x)
    streamed = open_shards("hub-stream:org/cifar", None, 3)
    assert len(streamed) == 14 and streamed.groups[0].read().num_rows == 3, "what is cached needs no hub"
    assert len(hub.queries) == before and not hub.ranges
    with pytest.raises(UserError, match="the hub cannot be queried for org/plain, and no earlier answer is cached"):
        image_set("hub:org/plain")


def test_a_name_without_a_revision_keeps_its_commit_and_a_branch_moves(
    hub: DataHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert open_hub("org/cifar").commit == open_hub("org/cifar@main").commit == COMMIT
    hub.sets["org/cifar"].commits[MAIN] = NEXT
    assert open_hub("org/cifar").commit == COMMIT, "a run that goes on sees the images it began with"
    assert open_hub("org/cifar@main").commit == NEXT
    assert open_hub(f"org/cifar@{NEXT}").commit == NEXT
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert open_hub("org/cifar@main").commit == NEXT, "the last answer, where there is no hub"


def test_a_damaged_record_is_asked_for_again(hub: DataHub, tmp_path: Path) -> None:
    open_hub("org/cifar")
    (record,) = (tmp_path / "home" / "tinyfusion" / "hub").iterdir()
    record.write_text("{", encoding="utf-8")
    assert open_hub("org/cifar").commit == COMMIT
    assert json.loads(record.read_text())["commit"] == COMMIT


def test_a_stream_is_the_stream_of_the_same_files_on_a_disk(hub: DataHub, tmp_path: Path) -> None:
    for name, content in sets()["org/cifar"].branches[MAIN].items():
        if "train-" in name:
            (tmp_path / Path(name).name).write_bytes(content)
    far = StreamedBatches(open_shards("hub-stream:org/cifar", None, 3), Randomness(1), CPU, 6)
    near = StreamedBatches(open_shards(tmp_path, None, 3), Randomness(1), CPU, 6)
    assert (len(far), far.classes) == (len(near), near.classes) == (14, 5)
    for step in (0, 1, 2, 7, 3):
        draws = Randomness(1).at(step, 0, 5)
        one, other = far(step, 5, draws), near(step, 5, draws)
        assert torch.equal(one.x, other.x) and torch.equal(one.condition["labels"], other.condition["labels"])
    assert hub.ranges and not hub.whole, "no file was fetched whole"
    assert not list((tmp_path / "home").rglob("*.parquet")), "and none is kept"


def test_labels_of_a_stream_are_known_from_the_footers(hub: DataHub) -> None:
    """Reading them would be a request for every row group."""
    open_shards("hub-stream:org/cifar", None, 3)
    reads = {path: sum(1 for where, _num in hub.ranges if where == path) for path, _num in hub.ranges}
    first = "plain_text/train-00000-of-00002.parquet"
    assert reads["plain_text/train-00001-of-00002.parquet"] <= reads[first] <= 4


def test_requests_that_fail_for_a_moment_are_made_again(hub: DataHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    shards = open_shards("hub-stream:org/cifar", None, 3)
    hub.failures = 2
    assert shards.groups[0].read().num_rows == 3 and hub.failures == 0
    hub.sets["org/cifar"].branches[MAIN].clear()
    with pytest.raises(UserError, match=r"org/cifar/plain_text/train-00000-of-00002.parquet cannot be read: "):
        shards.groups[0].read()


def test_a_range_that_was_not_asked_for_is_no_content(hub: DataHub) -> None:
    shards = open_shards("hub-stream:org/cifar", None, 3)
    hub.shift = 1
    with pytest.raises(
        UserError, match=r"cannot be read: requested \d+ bytes from \d+ on, got \d+ with status 206, range"
    ):
        shards.groups[0].read()


@pytest.mark.parametrize("path", ["../train.parquet", "/etc/train.parquet", "a/./train.parquet", "a\0/train.parquet"])
def test_a_listing_that_leads_out_of_the_repository_is_refused(hub: DataHub, tmp_path: Path, path: str) -> None:
    hub.sets["org/out"] = DataSet({MAIN: {path: table(0, 2)}})
    with pytest.raises(
        UserError, match=r"the hub lists .*train.parquet' of org/out: wanted a path inside the repository"
    ):
        open_hub("org/out")
    open_hub("org/cifar")
    (record,) = (tmp_path / "home" / "tinyfusion" / "hub").iterdir()
    content = json.loads(record.read_text(encoding="utf-8"))
    record.write_text(json.dumps({**content, "files": [[path, 10]]}), encoding="utf-8")
    assert paths(open_hub("org/cifar")) != [path], "queried again"


@pytest.mark.parametrize("configs", [3, [3, None, "a"], [{"data_files": 3}], [{"data_dir": "data"}]])
def test_a_card_of_another_form_says_nothing(hub: DataHub, configs: Any) -> None:
    hub.sets["org/plain"].card = {"configs": configs}
    assert paths(open_hub("org/plain")) == ["data/train-00000-of-00001.parquet"]


@pytest.mark.parametrize("files", [[{"path": 3}], {"train": None}, {"train": {"path": 3}}, [3]])
def test_a_card_that_names_no_files(hub: DataHub, files: Any) -> None:
    hub.sets["org/plain"].card = {"configs": [{"data_files": files}]}
    with pytest.raises(UserError, match="org/plain has no parquet files"):
        open_hub("org/plain")


def test_pictures_to_encode_come_from_the_hub_in_the_order_of_their_files(hub: DataHub, tmp_path: Path) -> None:
    (tmp_path / "train-00000-of-00001.parquet").write_bytes(
        sets()["org/jpg"].branches[CONVERTED]["default/train/0000.parquet"]
    )
    local = open_originals(f"parquet:{tmp_path}")
    for prefix in ("hub", "hub-stream"):
        found = open_originals(f"{prefix}:org/jpg")
        assert found.labels.tolist() == [0, 1, 2, 3, 4, 0]
        assert [c for _, c in found.contents(0, 5)] == [c for _, c in local.contents(0, 5)]
    assert len({open_originals(f"{prefix}:org/jpg").fingerprint for prefix in ("hub", "hub-stream")}) == 1


@pytest.mark.parametrize("prefix", ["hub", "hub-stream"])
def test_columns_by_usual_names_or_as_the_file_declares_them(hub: DataHub, prefix: str) -> None:
    assert open_originals(f"{prefix}:org/unusual").labels.tolist() == [0, 1, 2, 3]
    assert open_originals(f"{prefix}:org/fine").labels.tolist() == [0, 1]
    with pytest.raises(UserError, match=r"has the columns text, label: wanted img or image"):
        open_originals(f"{prefix}:org/words")


@pytest.mark.parametrize("prefix", ["hub", "hub-stream"])
def test_a_gated_set_says_what_to_do(hub: DataHub, prefix: str) -> None:
    with pytest.raises(UserError, match="the hub gives org/gated only after its terms were accepted"):
        open_originals(f"{prefix}:org/gated")
