# ruff: noqa: E501
"""CLIP score, pairs and scores without a reference, on samples with prompts, against transformers and closed forms; and the page."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from prompt_pipelines import save_clip
from tinyfusion import cli
from tinyfusion.commands.report import render_run
from tinyfusion.core.rundir import stamp
from tinyfusion.data.image_source import source_of
from tinyfusion.evaluate.clip import open_clip
from tinyfusion.evaluate.fidelity import psnr_db, ssim
from tinyfusion.jobs.drawn_output import write_samples
from tinyfusion.models import hub
from tinyfusion.report.images import prompt_rows
from tinyfusion.report.load import read_run

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about itself
PROMPTS = ["a cat", "a red dog", "the sea"]
PROTOCOL = "5 images | FluxPipeline 01234567, 28 steps, guidance_scale 3.5, 40 x 48 | prompts 89abcdef in turn | bfloat16 | seed 0"
LABELS = np.arange(5, dtype=np.int64) % 3
Run = Callable[..., Any]


def pictures(seed: int, *shape: int) -> np.ndarray:
    """Smooth in places, so that pictures differ for CLIP."""
    coarse = np.random.default_rng(seed).integers(0, 256, (shape[0], *shape[1:-3], 5, 6, 3), dtype=np.uint8)
    return coarse.repeat(shape[-3] // 5, axis=-3).repeat(shape[-2] // 6, axis=-2)


IMAGES = pictures(0, 5, 40, 48, 3)
NOISY = np.where(np.arange(48)[:, None] % 2, IMAGES.clip(3, 252) + 3, IMAGES.clip(3, 252) - 3).astype(np.uint8)
VIDEOS = pictures(1, 5, 4, 40, 48, 3)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """A command: its JSON, or the last line of its error."""

    def command(*arguments: Any) -> Any:
        code = cli.main([*map(str, arguments), "--json"])
        out, err = capsys.readouterr()
        if code == 2:
            return err.strip().splitlines()[-1]
        assert code == 0, err
        return {**json.loads(out.strip().splitlines()[-1]), "said": err}

    return command


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP model, and samples of a teacher and a student with their prompts, images and videos."""
    folder = tmp_path_factory.mktemp("scores")
    save_clip(folder / "clip")
    for name, images in (
        ("teacher", IMAGES.clip(3, 252)),
        ("student", NOISY),
        ("video", VIDEOS),
        ("other", VIDEOS[::-1]),
    ):
        record = {"protocol": PROTOCOL, "num_images": 5, "prompts": PROMPTS}
        write_samples(
            folder / f"{name}.npz", source_of(images) if images.ndim == 4 else streamed(images), LABELS, record
        )
    return folder


def streamed(videos: np.ndarray) -> Any:
    from tinyfusion.data.image_source import ImageSource

    shape: Any = videos.shape
    return ImageSource(shape, videos.dtype, lambda size: (videos[i : i + size] for i in range(0, len(videos), size)))


def transformers_scores(folder: Path, images: np.ndarray, prompts: list[str]) -> np.ndarray:
    """100 max(cos, 0) of pairs, by the model's own logits."""
    from transformers import CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model = CLIPModel.from_pretrained(folder)
    texts = CLIPTokenizer.from_pretrained(folder)(prompts, padding=True, return_tensors="pt")
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(
        [Image.fromarray(each) for each in images], return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(input_ids=texts["input_ids"], attention_mask=texts["attention_mask"], **pixels).logits_per_image
        cosines = logits.diagonal() / model.logit_scale.exp()
    return np.asarray(100 * cosines.clamp(min=0))


# --------------------------------------------------------------------------------------------------------------- scores


def test_the_clip_score_is_that_of_transformers(place: Path) -> None:
    prompts = [PROMPTS[label] for label in LABELS]
    scorer = open_clip(str(place / "clip"), "cpu")
    found = scorer.scores(IMAGES, prompts)
    wanted = transformers_scores(place / "clip", IMAGES, prompts)
    assert np.allclose(found, wanted, atol=1e-4) and wanted.max() > 1 and len(set(wanted.round(3))) > 2
    frames = np.stack([transformers_scores(place / "clip", VIDEOS[:, i], prompts) for i in range(4)])
    assert np.allclose(scorer.scores(VIDEOS, prompts), frames.mean(0), atol=1e-4)
    alone = np.concatenate([scorer.scores(IMAGES[i : i + 1], prompts[i : i + 1]) for i in range(5)])
    assert np.allclose(alone, found, atol=1e-4)
    assert scorer.scores(IMAGES, ["very long " * 90] * 5).shape == (5,)


def test_evaluate_scores_prompts_without_a_reference(place: Path, run: Run, tmp_path: Path) -> None:
    outcome = run(
        "evaluate", "--samples", place / "student.npz", "--clip", place / "clip", "--out", tmp_path / "x.json"
    )
    wanted = transformers_scores(place / "clip", NOISY, [PROMPTS[label] for label in LABELS])
    assert outcome["clip_score"] == pytest.approx(wanted.mean(), abs=1e-4)
    record = json.loads((tmp_path / "x.json").read_text())
    assert record["clip"]["std"] == pytest.approx(wanted.std(), abs=1e-4)
    assert outcome["fid"] is None and outcome["num_images"] == 5
    assert outcome["protocol"] == f"CLIP clip {record['clip']['hash'][:8]} | no reference | {PROTOCOL}"
    assert "CLIP score" in outcome["said"] and "FID" not in outcome["said"]
    again = run("evaluate", "--samples", place / "student.npz", "--clip", place / "clip", "--out", tmp_path / "x.json")
    assert "is finished" in again["said"] and again["clip_score"] == outcome["clip_score"]


def test_prompts_from_a_file_where_no_record_has_them(place: Path, run: Run, tmp_path: Path) -> None:
    np.savez(tmp_path / "bare.npz", IMAGES, LABELS)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    words = [
        "evaluate",
        "--samples",
        tmp_path / "bare.npz",
        "--clip",
        place / "clip",
        "--prompts",
        tmp_path / "prompts.txt",
    ]
    wanted = transformers_scores(place / "clip", IMAGES, [PROMPTS[label] for label in LABELS]).mean()
    assert run(*words, "--out", tmp_path / "x.json")["clip_score"] == pytest.approx(wanted, abs=1e-4)


def test_pairs_alone_are_scored_in_closed_form(place: Path, run: Run, tmp_path: Path) -> None:
    """All pixels differ by 3 levels: PSNR 20 log10(255 / 3). Equal images: SSIM 1."""
    words = ["evaluate", "--samples", place / "student.npz", "--out", tmp_path / "x.json", "--against"]
    found = run(*words, place / "teacher.npz")["against"]
    assert found["psnr_db"] == pytest.approx(20 * np.log10(255 / 3)) and found["psnr_db_std"] == pytest.approx(0)
    assert found["ssim"] == pytest.approx(ssim(NOISY, IMAGES.clip(3, 252)).mean()) and found["ssim"] < 1
    same = run(
        "evaluate", "--samples", place / "student.npz", "--out", tmp_path / "y.json", "--against", place / "student.npz"
    )
    assert same["against"]["ssim"] == pytest.approx(1) and "lpips" not in same["against"]


def test_pairs_of_videos_are_those_of_frames(place: Path, run: Run, tmp_path: Path) -> None:
    words = ["evaluate", "--samples", place / "video.npz", "--against", place / "other.npz", "--clip", place / "clip"]
    outcome = run(*words, "--out", tmp_path / "x.json")
    frames, others = (each.reshape(-1, 40, 48, 3) for each in (VIDEOS, VIDEOS[::-1]))
    assert outcome["against"]["psnr_db"] == pytest.approx(psnr_db(frames, others).mean())
    assert outcome["against"]["ssim"] == pytest.approx(ssim(frames, others).mean())
    assert outcome["clip_score"] > 0


def test_lpips_where_its_package_is(place: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of that name that measures the mean absolute difference."""
    package = ModuleType("lpips")
    package.__spec__ = object()  # type: ignore[assignment]  # found

    class LPIPS(torch.nn.Module):
        def __init__(self, net: str, verbose: bool) -> None:
            super().__init__()

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return (x - y).abs().mean((1, 2, 3), keepdim=True)

    package.LPIPS = LPIPS  # type: ignore[attr-defined]
    large = {
        name: images.repeat(2, axis=1).repeat(2, axis=2) for name, images in (("s", NOISY), ("t", IMAGES.clip(3, 252)))
    }
    for name, images in large.items():
        write_samples(tmp_path / f"{name}.npz", images, LABELS, {"protocol": PROTOCOL, "num_images": 5})
    words = ["evaluate", "--samples", tmp_path / "s.npz", "--against", tmp_path / "t.npz", "--out"]
    without = run(*words, tmp_path / "x.json")
    assert (
        "LPIPS is left out: the package lpips is not installed" in without["said"] and "lpips" not in without["against"]
    )
    monkeypatch.setitem(sys.modules, "lpips", package)
    found = run(*words, tmp_path / "y.json")
    assert found["against"]["lpips"] == pytest.approx(3 / 127.5, rel=1e-5) and "LPIPS" in found["said"]


def test_models_of_the_hub_are_fetched_by_their_files(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[Any] = []
    monkeypatch.setattr(hub, "_snapshot", lambda *given: fetched.append(given) or place / "clip")
    scorer = open_clip("openai/clip-vit-tiny@main", "cpu")
    assert scorer.name == "openai/clip-vit-tiny@main" and scorer.hash == open_clip(str(place / "clip"), "cpu").hash
    ((repository, revision, files),) = fetched
    assert (repository, revision) == ("openai/clip-vit-tiny", "main")
    assert {"model.safetensors", "*.json"} <= set(files) and not any(name.endswith((".bin", ".py")) for name in files)


# ------------------------------------------------------------------------------------------------------------- the page


def test_the_page_shows_prompts_under_pairs(place: Path, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "samples").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(stamp("prune", {"name": "flux"}, "done")))
    for name in ("teacher", "student"):
        for suffix in ("npz", "json"):
            shutil.copy(place / f"{name}.{suffix}", folder / "samples")
    words = ["evaluate", "--clip", place / "clip", "--samples"]
    run(*words, folder / "samples/teacher.npz", "--out", folder / "evaluations/teacher-prompts.json")
    run(
        *words,
        folder / "samples/student.npz",
        "--against",
        folder / "samples/teacher.npz",
        "--out",
        folder / "evaluations/student-prompts.json",
    )
    rows = prompt_rows(read_run(folder))
    assert [row.text for row in rows] == PROMPTS
    assert [[sheet.role for sheet in row.sheets] for row in rows] == [["teacher", "student"]] * 3
    page = render_run(folder)
    for words_of in (*PROMPTS, "Prompts, drawn by every model from the same noise", "CLIP score ↑", "PSNR in dB ↑"):
        assert words_of in page, words_of
    assert page.count('class="pair"') == 3 and "against prompts" not in page and "Samples of every model" not in page
    places = [page.index(f"<figcaption>{prompt}") for prompt in PROMPTS]
    assert places == sorted(places) and all(
        page.rindex("<img", 0, at) > page.rindex('class="pair"', 0, at) for at in places
    )


def test_the_page_shows_the_middle_frame_of_videos(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "samples").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(stamp("prune", {"name": "wan"}, "done")))
    for suffix in ("npz", "json"):
        shutil.copy(place / f"video.{suffix}", folder / "samples" / f"teacher.{suffix}")
    assert np.array_equal(read_run(folder).samples["teacher"].images, VIDEOS[:, 2])
    assert render_run(folder).count('class="pair"') == 3


def test_a_hostile_prompt_stays_text(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "samples").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(stamp("prune", {"name": "x"}, "done")))
    hostile = "<script>alert('x')</script>"
    record = {"protocol": PROTOCOL, "prompts": [hostile, *PROMPTS]}
    write_samples(folder / "samples" / "teacher.npz", IMAGES, LABELS, record)
    assert "alert" in (page := render_run(folder)) and hostile not in page


# ------------------------------------------------------------------------------------------------------------- bad input


def changed_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def prepare(here: Path) -> None:
        file = here / "clip" / "model.safetensors"
        stored = load_file(file)
        change(stored)
        save_file(stored, file, {"format": "pt"})

    return prepare


def only_bin(here: Path) -> None:
    torch.save(load_file(here / "clip/model.safetensors"), here / "clip/pytorch_model.bin")
    (here / "clip/model.safetensors").unlink()


CLIP = "evaluate --samples student.npz --clip clip --out x.json"
AGAINST = "evaluate --samples student.npz --against teacher.npz --out x.json"
VIDEO = "evaluate --samples video.npz --out x.json"
Row = tuple[str, str, Callable[[Path], Any] | None]
BAD: dict[str, Row] = {
    "clip-gone": (CLIP.replace("clip clip", "clip gone"), "no CLIP model at gone: no such folder", None),
    "clip-no-config": (CLIP, "it has no config.json", lambda here: (here / "clip/config.json").unlink()),
    "clip-no-processor": (CLIP, "it has no preprocessor_config.json", lambda here: (here / "clip/preprocessor_config.json").unlink()),
    "clip-no-tokenizer": (CLIP, "clip has no tokenizer: wanted tokenizer.json, or vocab.json", lambda here: [(here / "clip" / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")]),
    "clip-of-another-kind": (CLIP, "clip is a 'siglip' model, wanted a CLIP model", lambda here: changed_json(here / "clip/config.json", model_type="siglip")),
    "clip-bin": (CLIP, "clip holds no safetensors", only_bin),
    "clip-torn": (CLIP, "no readable safetensors file", lambda here: (here / "clip/model.safetensors").write_bytes(b"\0" * 40)),
    "clip-missing": (CLIP, "missing_keys visual_projection.weight", tensors(lambda stored: stored.pop("visual_projection.weight"))),
    "clip-unexpected": (CLIP, "unexpected_keys more.weight", tensors(lambda stored: stored.update({"more.weight": torch.ones(2)}))),
    "clip-misshapen": (CLIP, "text_projection.weight", tensors(lambda stored: stored.update({"text_projection.weight": torch.ones(3, 3)}))),
    "clip-not-finite": (CLIP, "the weights in clip are damaged", tensors(lambda stored: stored["logit_scale"].fill_(float("nan")))),
    "clip-of-another-size": (CLIP, "the CLIP model clip and its configuration do not go together",
                             lambda here: changed_json(here / "clip/preprocessor_config.json", crop_size={"height": 33, "width": 32})),
    "clip-of-fewer-words": (CLIP, "the CLIP model clip and its configuration do not go together: index out of range",
                            lambda here: [save_clip(here / "other", words=30), shutil.copy(here / "other/model.safetensors", here / "clip"), shutil.copy(here / "other/config.json", here / "clip")]),
    "clip-overflows": (CLIP, "its features are not finite, or zero", tensors(lambda stored: stored["visual_projection.weight"].fill_(1e30))),
    "prompts-of-others": (f"{CLIP} --prompts p.txt", "student.npz was drawn from other prompts than p.txt holds", lambda here: (here / "p.txt").write_text("a dog")),
    "prompts-unknown": (CLIP, "student.npz has no record of prompts", lambda here: (here / "student.json").unlink()),
    "prompts-empty": (f"{CLIP} --prompts p.txt", "p.txt holds no prompts", lambda here: (here / "p.txt").write_text("\n")),
    "labels-missing": (f"{CLIP.replace('student', 'bare')} --prompts p.txt", "bare.npz has no labels",
                       lambda here: [np.savez(here / "bare.npz", IMAGES), (here / "p.txt").write_text("a dog")]),
    "labels-beyond": (f"{CLIP.replace('student', 'bare')} --prompts p.txt", "bare.npz has labels 0 to 2, and there are 1 prompts",
                      lambda here: [np.savez(here / "bare.npz", IMAGES, LABELS), (here / "p.txt").write_text("a dog")]),
    "floats": (f"{CLIP.replace('student', 'bare')} --prompts p.txt", "a CLIP score is of uint8 images",
               lambda here: [np.savez(here / "bare.npz", IMAGES / np.float32(255), LABELS), (here / "p.txt").write_text("a dog")]),
    "videos-alone": (VIDEO, "video.npz holds videos: give --against NPZ", None),
    "videos-with-a-reference": (f"{VIDEO} --clip clip --reference teacher.npz", "distances to a reference are of images", None),
    "videos-against-images": (f"{VIDEO} --against teacher.npz --clip clip", "pairs are of one shape", None),
    "videos-against-images-alone": (f"{VIDEO} --against teacher.npz", "holds videos", None),
    "pairs-of-other-prompts": (AGAINST, "was drawn with 'prompts ffff in turn'",
                               lambda here: changed_json(here / "teacher.json", protocol=PROTOCOL.replace("89abcdef", "ffff"))),
    "pairs-of-another-seed": (AGAINST, "was drawn with 'seed 1'", lambda here: changed_json(here / "teacher.json", protocol=PROTOCOL.replace("seed 0", "seed 1"))),
    "no-reference-and-nothing-else": ("evaluate --samples student.npz --out x.json", "no reference is named", None),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, place: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words, message, prepare = BAD[name]
    shutil.copytree(place, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    if prepare:
        prepare(Path())
    answer = run(*words.split())
    assert isinstance(answer, str) and answer.startswith("error: ") and message in answer, answer
    assert not Path("x.json").exists()


def test_numbers_of_positions_of_older_files_are_no_error(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "clip", tmp_path / "clip")
    tensors(lambda stored: stored.update({"text_model.embeddings.position_ids": torch.arange(77)[None]}))(tmp_path)
    assert open_clip(str(tmp_path / "clip"), "cpu").hash == open_clip(str(place / "clip"), "cpu").hash
