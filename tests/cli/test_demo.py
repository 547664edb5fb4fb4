"""`demo`: the page draws in a real browser what `sample` draws, and the verb keeps its promises without one."""

from __future__ import annotations

import base64
import functools
import gzip
import http.server
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from material import Cli, done, pages_of_few_bytes, refused, tiny, tiny_sit

from browser import NAMES, Page, browser, find_browser
from loopback_http import answering
from tinyfusion.core.errors import UserError
from tinyfusion.core.records import read_record
from tinyfusion.evaluate.extractors import open_extractor
from tinyfusion.jobs import web_runtime
from tinyfusion.models.checkpoint import open_model, save_model
from tinyfusion.prune.criteria import by_indices

pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
READY, COMPLETE = (
    "document.documentElement.dataset.ready === 'true'",
    "tinyfusionPage.complete && !tinyfusionPage.playing",
)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of a few bytes."""
    pages_of_few_bytes(monkeypatch)


# ---------------------------------------------------------------------------------------------------------------- the verb


def test_a_page_is_written_once_and_kept(cli: Cli, work: Path, stand_in: None) -> None:
    outcome = done(cli, "demo student --vs teacher --out page --json")
    sizes, page = outcome.last_json["files"], Path("page")
    assert {name: (page / name).stat().st_size for name in sizes} == sizes
    assert outcome.last_json["bytes"] == sum(sizes.values()) and "MB, of which networks" in outcome.err
    facts = json.loads((page / "facts.js").read_text(encoding="utf-8").partition("= ")[2].rstrip().rstrip(";"))
    assert [(each["role"], each["name"], each["columns"]) for each in facts["models"]] == [
        ("Teacher", "teacher", [0, 1, 2, 3]), ("Student", "student", [0, 2])
    ]  # fmt: skip
    text = (page / "assets" / "network-1.js").read_text(encoding="utf-8").split('"')[3]
    assert gzip.decompress(base64.b64decode(text)) == b"a network with gates"
    before = (page / "facts.js").stat().st_mtime_ns
    assert "is finished" in done(cli, "demo teacher --vs student --out page").err  # the same page
    refused(cli, "demo teacher --out page", "another recipe")
    (page / "mine.txt").write_text("mine", encoding="utf-8")
    assert (page / "facts.js").stat().st_mtime_ns == before
    done(cli, "demo teacher --out page --overwrite")
    assert not (page / "assets" / "network-1.js").exists() and (page / "mine.txt").exists()
    assert read_record(page / "tinyfusion.json")["state"] == "done"


def test_classes_have_names(cli: Cli, work: Path, stand_in: None) -> None:
    Path("names.txt").write_text("".join(f"class {i}\n" for i in range(10)), encoding="utf-8")
    done(cli, "demo student --labels names.txt --out page")
    assert '"classes": ["class 0", ' in Path("page/facts.js").read_text(encoding="utf-8")
    refused(cli, "demo five-classes --labels names.txt --out other", "names 10 classes")


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        ("demo mar", ["noise, or of a flow"]),
        ("demo teacher --vs smaller-images", ["one noise", "8 side", "4 side"]),
        ("demo teacher --vs five-classes", ["10 classes", "5 classes"]),
        ("demo latents", ["pixels", "latents"]),
        ("demo teacher --guidance 0.5", ["at least 1"]),
        ("demo teacher --runtime absent", ["--runtime wants", "absent"]),
        ("demo teacher --runtime other", ["ort.wasm.min.js", "is not that of onnxruntime-web"]),
        ("demo teacher --runtime damaged.tgz", ["is not onnxruntime-web"]),
    ],
    ids=lambda value: value.removeprefix("demo ") if isinstance(value, str) else "",
)
def test_bad_input(cli: Cli, work: Path, command: str, parts: list[str]) -> None:
    save_model(tiny(in_channels=4), work / "latents")
    (work / "other").mkdir()
    (work / "other" / web_runtime.FILES[0]).write_text("//", encoding="utf-8")
    (work / "damaged.tgz").write_bytes(b"no archive")
    refused(cli, f"{command} --out page", *parts)
    assert not Path("page").exists()


def test_the_runtime_is_fetched_by_npm_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_runtime, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(web_runtime.shutil, "which", lambda _: None)
    with pytest.raises(UserError, match=r"no npm.*--runtime"):
        web_runtime.runtime_files(None)
    npm = tmp_path / "npm"
    monkeypatch.setattr(web_runtime.shutil, "which", lambda _: str(npm))
    for script, said in (
        ("echo 'npm error code E404' >&2; echo 'npm error no such package' >&2; exit 1", "no such package"),
        ("while [ $# -gt 1 ]; do shift; done; echo other > $1/x.tgz", "is not onnxruntime-web"),
    ):
        npm.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        npm.chmod(0o755)
        with pytest.raises(UserError, match=said):
            web_runtime.runtime_files(None)
    assert not (tmp_path / "cache").exists()


# ------------------------------------------------------------------------------------------------------------- the browser


@pytest.fixture(scope="module")
def tab() -> Iterator[Page]:
    """A tab of a browser."""
    program = find_browser()
    if program is None:
        pytest.skip(f"no browser on the path, of {', '.join(NAMES)}")
    with browser(program) as page:
        yield page


@pytest.fixture(scope="module")
def runtime() -> None:
    """The real runtime is at hand."""
    try:
        web_runtime.runtime_files(None)
    except UserError as error:
        pytest.skip(str(error))


def seen(tab: Page, side: int) -> np.ndarray:
    """(N, H, W) grey values on the canvases of a model."""
    tab.wait(COMPLETE)
    read = "c.getContext('2d').getImageData(0, 0, c.width, c.height).data"
    values = tab.evaluate(
        f"[...document.querySelectorAll('.own-{side} canvas')].map((c) => [...{read}].filter((_, i) => i % 4 === 0))"
    )
    size = int(len(values[0]) ** 0.5)
    return np.array(values).reshape(len(values), size, size)


def drawn(cli: Cli, options: str) -> np.ndarray:
    """(N, H, W) grey values that `sample` draws."""
    done(cli, f"sample {options} --guidance 1.5 --seed 0 --out drawn.npz --overwrite")
    return np.load("drawn.npz")["arr_0"][..., 0].astype(int)


def change(tab: Page, id: str, value: Any) -> None:
    """Move a control, as a person does."""
    kind = "change" if id.startswith("sampler") else "input"
    tab.evaluate(f"(() => {{ const e = document.getElementById('{id}'); e.value = {value!r};"
                 f" e.dispatchEvent(new Event('{kind}')); }})()")  # fmt: skip


def unnamed(tab: Page) -> list[str]:
    """Roles of controls without an accessible name."""
    nodes = tab.call("Accessibility.getFullAXTree")["nodes"]
    controls = ("button", "slider", "switch", "textbox", "combobox", "image")
    roles = [(node["role"]["value"], node.get("name", {}).get("value")) for node in nodes if not node["ignored"]]
    assert {role for role, _ in roles} >= {"button", "slider", "switch", "textbox", "image"}
    return [role for role, name in roles if role in controls and not name]


def test_a_page_from_the_disk_draws_the_digits_that_are_typed(cli: Cli, runtime: None, tab: Page, tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    teacher = open_model("digits")
    save_model(teacher.cut(by_indices(teacher, [0, 1, 3], 0)), tmp_path / "cut")
    done(cli, "demo cut --vs digits --out page")
    tab.size(1280, 900)
    tab.prefer(still=True)
    tab.open((tmp_path / "page" / "index.html").as_uri())
    tab.wait(READY)
    change(tab, "steps-0", "9")
    assert tab.evaluate("tinyfusionPage.sides[0].steps") == 16
    images = seen(tab, 0)
    own = drawn(cli, "--model digits --sampler ddim --num-steps 16 --labels 3,1,4,1,5 --num-images 5")
    assert np.abs(images - own).max() <= 2

    pixels = torch.from_numpy(images).to(torch.uint8).unsqueeze(-1).numpy()
    features = open_extractor("digits-classifier", torch.device("cpu"))(pixels)
    assert features.logits is not None and features.logits.argmax(1).tolist() == [3, 1, 4, 1, 5]

    # keys: a digit more, then a block off
    tab.evaluate("document.getElementById('classes').focus()")
    tab.press("End", 35)
    tab.press("7", 55, "7")
    assert tab.evaluate("tinyfusionPage.labels.join('')") == "314157" and len(seen(tab, 0)) == 6
    tab.evaluate("document.querySelector('.own-0 .block').focus()")
    tab.press(" ", 32, " ")
    assert tab.evaluate("document.activeElement.getAttribute('aria-checked')") == "false"
    assert np.abs(seen(tab, 0)[:5] - own).max() > 20
    tab.evaluate("document.getElementById('all-on').click()")
    assert np.abs(seen(tab, 0)[:5] - own).max() <= 2

    # the drawing again, slowly, until the clock is moved by hand
    tab.evaluate("document.getElementById('slow').click()")
    assert tab.evaluate("Boolean(tinyfusionPage.playing)")
    change(tab, "clock", "0")
    assert not tab.evaluate("Boolean(tinyfusionPage.playing)") and np.abs(seen(tab, 0)[:5] - own).max() > 20

    # the teacher with the blocks of an unrecovered student draws as the student does
    change(tab, "steps-1", "9")
    tab.evaluate("document.getElementById('as-student').click()")
    assert np.abs(seen(tab, 0) - seen(tab, 1)).max() <= 2

    assert unnamed(tab) == []
    for dark in (True, False):
        tab.prefer(dark=dark, still=True)
        tab.size(375, 740, mobile=True)
        assert tab.evaluate("document.documentElement.scrollWidth") == 375
    assert tab.errors == []


def test_a_served_page_draws_with_a_flow(cli: Cli, runtime: None, tab: Page, tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    save_model(tiny_sit(), tmp_path / "sit")
    done(cli, "demo sit --out page")

    class Silent(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    handler: Callable[..., Any] = functools.partial(Silent, directory=str(tmp_path / "page"))
    with answering(handler) as address:  # type: ignore[arg-type]
        tab.open(f"{address}/index.html")
        tab.wait(f"{READY} && location.protocol === 'http:'")
        wanted = "--model sit --sampler ode --labels 3,1,4,1,5 --num-images 5 --set sample.flow.method="
        assert np.abs(seen(tab, 0) - drawn(cli, f"{wanted}heun2 --num-steps 26")).max() <= 2
        change(tab, "sampler-0", "1")
        change(tab, "steps-0", "5")
        assert np.abs(seen(tab, 0) - drawn(cli, f"{wanted}euler --num-steps 7")).max() <= 2
        change(tab, "classes", "4x")
        assert "no class" in tab.evaluate("document.getElementById('message').textContent")
    assert tab.errors == []
