# ruff: noqa: E501
"""Prompts drawn by pipelines of diffusers: equal noise for teacher and student, the pipeline's own images, resuming, videos, bench, refusals."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from prompt_pipelines import save_flux_pipeline, save_wan_pipeline
from tinyfusion import cli, open_model
from tinyfusion.config.recipe import PipelineSection
from tinyfusion.core.rng import Randomness
from tinyfusion.core.signals import Interrupted
from tinyfusion.data.recorded import recording
from tinyfusion.jobs import pipelines
from tinyfusion.jobs.pipelines import ModelPipeline, pipeline_of, pipeline_with
from tinyfusion.jobs.prompt_drawing import PromptDrawing, generators, pipeline_arguments, precise_noise
from tinyfusion.jobs.transformers import call_macs
from tinyfusion.models.transformer import TransformerModel

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers, about itself
PROMPTS = ["a cat", "a red dog", "the sea"]
SIZE = {"num_inference_steps": 2, "height": 16, "width": 16}
FLUX = ["--num-steps", "2", "--height", "16", "--width", "16"]
WAN = [*FLUX, "--frames", "5"]
BUDGETS = "prune.budgets=transformer_blocks=2,single_transformer_blocks=2"
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pipelines, prompts, a student of the first, one of the second's second expert, and samples of the first and its student."""
    folder = tmp_path_factory.mktemp("drawing")
    (folder / "prompts.txt").write_text("a cat\n\n a red dog \nthe sea\n")
    save_flux_pipeline(folder / "flux")
    save_wan_pipeline(folder / "wan")
    for teacher, name, how in (
        ("flux", "student", ["--set", BUDGETS]),
        ("wan/transformer_2", "expert", ["--num-keep", "2"]),
    ):
        words = [
            "prune",
            "--teacher",
            folder / teacher,
            "--criterion",
            "uniform",
            *how,
            "--out",
            folder / "runs" / name,
        ]
        assert cli.main([*map(str, words)]) == 0
    for model, name in (("flux", "teacher"), ("runs/student", "student")):
        words = [
            "sample",
            "--model",
            folder / model,
            "--prompts",
            folder / "prompts.txt",
            "--out",
            folder / f"{name}.npz",
        ]
        assert cli.main([*map(str, words), *FLUX]) == 0
    return folder


def arrays(file: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(file) as stored:
        return stored["arr_0"], stored["arr_1"]


def drawing(source: Path, dtype: str | None = None, batch_size: int = 3, seed: int = 0) -> PromptDrawing:
    pipeline = pipeline_of(str(source), None).opened(torch.device("cpu"), dtype)
    return PromptDrawing(pipeline, PROMPTS, SIZE, seed, batch_size)


def noise_of(source: Path, last: int = 3, **settings: Any) -> torch.Tensor:
    """What the transformer of a drawing gets at its first step, images in order."""
    drawn = drawing(source, **settings)
    steps = SIZE["num_inference_steps"]
    with recording(drawn.pipeline.transformer) as calls:
        list(drawn.images(0, last))
    return torch.cat([call["hidden_states"] for call in calls[::steps]])


# ---------------------------------------------------------------------------------------------------------------- noise


def test_the_noise_of_an_image_depends_on_nothing_but_seed_and_index(place: Path) -> None:
    teacher = noise_of(place / "flux")
    assert teacher.shape[0] == 3 and not torch.equal(teacher[0], teacher[1])
    assert abs(float(teacher.std()) - 1) < 0.1
    assert torch.equal(teacher, noise_of(place / "runs" / "student")), "another model"
    assert torch.equal(teacher, noise_of(place / "flux", batch_size=2)), "another batch size"
    assert torch.equal(teacher, noise_of(place / "flux", last=5)[:3]), "more images"
    assert torch.equal(teacher.bfloat16(), noise_of(place / "flux", dtype="bfloat16")), "another type: rounded"
    assert not torch.equal(teacher, noise_of(place / "flux", seed=1))


def test_noise_of_odd_sizes_is_drawn_in_float32() -> None:
    """A generator's last 16 numbers depend on the type where their count is no multiple of 16."""
    from diffusers.utils.torch_utils import randn_tensor

    class Odd:
        def prepare_latents(self, batch: int, dtype: torch.dtype, generator: Any) -> tuple[torch.Tensor, torch.Tensor]:
            return randn_tensor((batch, 4, 5, 5), generator, dtype=dtype), torch.full((3,), 0.1)

    pipeline = Odd()
    precise, _ = pipeline.prepare_latents(2, torch.float32, generators(0, range(2)))
    plain, _ = pipeline.prepare_latents(2, torch.bfloat16, generators(0, range(2)))
    with precise_noise(pipeline):
        noise, ids = pipeline.prepare_latents(2, torch.bfloat16, generator=generators(0, range(2)))
    assert ids.dtype == torch.float32, "what does not follow the type is left alone"
    assert torch.equal(noise, precise.bfloat16()) and not torch.equal(plain, noise)
    assert torch.equal(pipeline.prepare_latents(2, torch.bfloat16, generators(0, range(2)))[0], plain), "as it was"


def test_where_components_are_follows_from_free_memory(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import FluxPipeline

    source, done = pipeline_of(str(place / "flux"), None), list[str]()
    for name in ("to", "enable_model_cpu_offload", "enable_sequential_cpu_offload"):
        monkeypatch.setattr(FluxPipeline, name, lambda *_, name=name, **__: done.append(name))
    largest = source.models["transformer"].num_bytes
    for free in (10 * largest, 1.3 * largest, largest):
        monkeypatch.setattr(pipelines, "available_bytes", lambda _device, free=free: free)
        source.opened(torch.device("cuda"))
    assert done == ["to", "enable_model_cpu_offload", "enable_sequential_cpu_offload"]


# --------------------------------------------------------------------------------------------------------------- images


def test_images_are_those_of_the_plain_pipeline(place: Path) -> None:
    """diffusers alone, `FluxPipeline.from_pretrained(teacher, transformer=student)`, with a generator of image 1."""
    from diffusers import FluxPipeline, FluxTransformer2DModel

    student = FluxTransformer2DModel.from_pretrained(place / "runs" / "student" / "student")
    for transformer, file in ((None, "teacher.npz"), (student, "student.npz")):
        given = {} if transformer is None else {"transformer": transformer}
        pipeline = FluxPipeline.from_pretrained(place / "flux", **given)
        generator = torch.Generator().manual_seed(Randomness(0).generator_seed("draw/1"))
        image = pipeline(prompt="a red dog", generator=generator, output_type="np", **SIZE).images[0]
        images, labels = arrays(place / file)
        assert images.shape == (3, 16, 16, 3) and images.dtype == np.uint8 and labels.tolist() == [0, 1, 2]
        assert np.array_equal(images[1], (image * 255).round().astype(np.uint8)), file
    assert not np.array_equal(arrays(place / "teacher.npz")[0], arrays(place / "student.npz")[0])


def test_the_record_names_what_the_images_depend_on(place: Path, run: Run) -> None:
    records = [json.loads((place / f"{name}.json").read_text()) for name in ("teacher", "student")]
    teacher, student = records
    assert teacher["prompts"] == student["prompts"] == PROMPTS
    assert teacher["protocol"] == student["protocol"]
    for words in ("3 images | FluxPipeline ", "2 steps, guidance_scale 3.5", "16 x 16", "in turn | float32 | seed 0"):
        assert words in teacher["protocol"]
    assert teacher["model"] == run("inspect", place / "flux")["hash"] != student["model"]


def test_more_images_than_prompts_and_any_batch(place: Path, run: Run, tmp_path: Path) -> None:
    words = ["sample", "--model", place / "flux", "--prompts", place / "prompts.txt", *FLUX]
    run(
        *words,
        "--out",
        tmp_path / "x.npz",
        "--num-images",
        5,
        "--batch-size",
        2,
        "--grid",
        tmp_path / "x.png",
        "--png",
        tmp_path / "png",
    )
    images, labels = arrays(tmp_path / "x.npz")
    assert labels.tolist() == [0, 1, 2, 0, 1]
    assert np.abs(images[:3].astype(int) - arrays(place / "teacher.npz")[0]).max() <= 1
    assert not np.array_equal(images[0], images[3]), "the same prompt, other noise"
    assert sorted(path.name for path in (tmp_path / "png").iterdir()) == [f"00000{i}.png" for i in range(5)]
    (tmp_path / "list.json").write_text(json.dumps(PROMPTS))
    run("sample", "--model", place / "flux", "--prompts", tmp_path / "list.json", *FLUX, "--out", tmp_path / "y.npz")
    assert np.array_equal(arrays(tmp_path / "y.npz")[0], arrays(place / "teacher.npz")[0])


def test_images_of_a_batch_have_the_negative_prompt(place: Path) -> None:
    """Two images at once are those drawn alone, with a second pass of guidance."""
    source = pipeline_of(str(place / "flux"), None)
    settings = PipelineSection(true_guidance=3.0, negative_prompt="grey", num_steps=2, height=16, width=16)
    pipeline, arguments = source.opened(torch.device("cpu")), pipeline_arguments(source, settings)
    alone, batch = (
        np.concatenate(list(PromptDrawing(pipeline, PROMPTS, arguments, 0, n).images(0, 2))) for n in (1, 2)
    )
    plain = next(PromptDrawing(pipeline, PROMPTS, SIZE, 0, 2).images(0, 2))
    assert np.abs(alone.astype(int) - batch).max() <= 1 and not np.array_equal(plain, batch)


def test_a_dry_run_draws_nothing_and_sums_the_weights(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "sample",
        "--model",
        place / "flux",
        "--prompts",
        place / "prompts.txt",
        "--out",
        tmp_path / "x.npz",
        "--dry-run",
    ]
    assert cli.main(list(map(str, words))) == 0
    said = capsys.readouterr().out
    assert "weights      0.00 GiB: transformer 0.00" in said and "text_encoder_2 0.00" in said and "vae 0.00" in said
    assert "28 steps, guidance_scale 3.5" in said and not list(tmp_path.iterdir())


def test_an_interrupted_drawing_continues_with_the_same_images(
    place: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [
        "sample",
        "--model",
        place / "flux",
        "--prompts",
        place / "prompts.txt",
        *FLUX,
        "--out",
        tmp_path / "x.npz",
    ]
    batch, made = PromptDrawing._batch, []

    def stopping(self: PromptDrawing, indices: range) -> np.ndarray:
        if len(made) == 2:
            raise Interrupted(15)
        made.append(indices)
        return batch(self, indices)

    with monkeypatch.context() as patch:
        patch.setattr(PromptDrawing, "_batch", stopping)
        assert cli.main(list(map(str, words))) == 143
    assert len(list((tmp_path / "x.npz.parts").glob("images-*.npy"))) == 2 and not (tmp_path / "x.npz").exists()
    (tmp_path / "x.npz.parts" / "images-0000000.npy").write_bytes(b"torn")
    made.clear()
    with monkeypatch.context() as patch:
        patch.setattr(PromptDrawing, "_batch", lambda self, indices: made.append(indices) or batch(self, indices))
        run(*words)
    assert [list(indices) for indices in made] == [[0], [2]], "the torn one and the missing one"
    assert (tmp_path / "x.npz").read_bytes() == (place / "teacher.npz").read_bytes()
    assert not (tmp_path / "x.npz.parts").exists()


def test_a_student_of_one_expert_takes_its_place(place: Path) -> None:
    expert = place / "runs" / "expert"
    source, depths = pipeline_of(str(expert), None), {"transformer": 4, "transformer_2": 2}
    in_memory = pipeline_with(cast(TransformerModel, open_model(expert)))
    for each in (source, in_memory):
        assert {name: sum(model.depths.values()) for name, model in each.models.items()} == depths
    assert source.folder == place / "wan"
    teacher = pipeline_of(str(place / "wan"), None)
    assert source.rest_hash == teacher.rest_hash and source.model_hash != teacher.model_hash


def test_videos_are_frames_and_an_mp4_where_ffmpeg_is(
    place: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "ffmpeg"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nimport sys\nopen(sys.argv[-1], 'w').write(' '.join(sys.argv[1:]))\n")
    program.chmod(0o755)
    words = [
        "sample",
        "--model",
        place / "runs" / "expert",
        "--prompts",
        place / "prompts.txt",
        *WAN,
        "--num-images",
        2,
    ]
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    run(*words, "--out", tmp_path / "v.npz", "--png", tmp_path / "png", "--grid", tmp_path / "v.png")
    videos, _ = arrays(tmp_path / "v.npz")
    assert videos.shape == (2, 5, 16, 16, 3)
    from PIL import Image

    assert sorted(path.name for path in (tmp_path / "png").iterdir()) == [
        "000000",
        "000000.mp4",
        "000001",
        "000001.mp4",
    ]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "png" / "000001" / "0003.png")), videos[1, 3])
    assert "-framerate 16" in (tmp_path / "png" / "000000.mp4").read_text()
    grid = np.asarray(Image.open(tmp_path / "v.png"))
    assert np.array_equal(grid[::4, ::4][:16, :16], videos[0, 2]), "the middle frame"
    assert run(*words, "--out", tmp_path / "v.npz")["num_images"] == 2  # is finished: whole


# ---------------------------------------------------------------------------------------------------------------- bench


def test_bench_counts_and_times_a_step_of_the_pipeline(place: Path, run: Run, tmp_path: Path) -> None:
    words = [
        "bench",
        place / "runs" / "student",
        "--vs",
        place / "flux",
        "--prompts",
        place / "prompts.txt",
        "--repeats",
        "2",
    ]
    outcome = run(*words, *FLUX[2:], "--batch-size", "2", "--set", "bench.product_size=64")
    run(
        "record",
        place / "flux",
        "--prompts",
        place / "prompts.txt",
        "--steps",
        "1",
        "--height",
        "16",
        "--width",
        "16",
        "--out",
        tmp_path / "x.safetensors",
    )
    one = {}
    for side, source in (("model", "runs/student"), ("vs", "flux")):
        ((_, model),) = pipeline_of(str(place / source), None).models.items()
        one[side] = call_macs(model, tmp_path / "x.safetensors")[""]
        assert outcome["models"][side]["macs"] == one[side]
        assert outcome["models"][side]["depth"] == sum(model.depths.values())
    assert outcome["speedup"]["macs_ratio"] == pytest.approx(one["vs"] / one["model"])
    assert (
        outcome["speedup"]["ratio"] > 0 and "FluxPipeline" in outcome["protocol"] and "2 images" in outcome["protocol"]
    )


def test_bench_counts_both_passes_of_guidance(place: Path, run: Run) -> None:
    words = [
        "bench",
        place / "wan",
        "--prompts",
        place / "prompts.txt",
        "--repeats",
        "1",
        *WAN[2:],
        "--set",
        "bench.product_size=64",
    ]
    guided, plain = run(*words), run(*words, "--guidance", "1")
    assert guided["models"]["model"]["macs"] == 2 * plain["models"]["model"]["macs"]


# ------------------------------------------------------------------------------------------------------------- bad input


def changed_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def not_finite(folder: Path) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["proj_out.bias"] = torch.full_like(tensors["proj_out.bias"], float("nan"))
    save_file(tensors, file, {"format": "pt"})


def without(file: Path, name: str) -> None:
    tensors = load_file(file)
    save_file({key: value for key, value in tensors.items() if not key.endswith(name)}, file, {"format": "pt"})


def wider(here: Path) -> None:
    """A student of a pipeline whose texts are wider."""
    save_flux_pipeline(here / "wide", pooled_projection_dim=48)


def dit_pipeline(here: Path) -> None:
    index = {
        "_class_name": "DiTPipeline",
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (here / "flux" / "model_index.json").write_text(json.dumps(index))


def of_another_teacher(here: Path) -> None:
    record = here / "runs" / "student" / "run.json"
    job = json.loads(record.read_text())["job"]
    changed_json(record, job={**job, "teacher": "gone"})


STUDENT = "sample --model runs/student --prompts prompts.txt --out x.npz"
TEACHER = "sample --model flux --prompts prompts.txt --out x.npz"
VIDEO = "sample --model wan --prompts prompts.txt --out x.npz --num-steps 2 --frames 5"
BENCH = "bench flux --prompts prompts.txt"
Row = tuple[str, str, Callable[[Path], Any] | None]
BAD: dict[str, Row] = {
    "prompts-missing": (TEACHER.replace("prompts.txt", "gone.txt"), "gone.txt does not exist", None),
    "prompts-empty": (TEACHER, "prompts.txt holds no prompts: wanted one a line", lambda here: (here / "prompts.txt").write_text(" \n\n")),
    "prompts-bytes": (TEACHER, "not UTF-8", lambda here: (here / "prompts.txt").write_bytes(b"\xff\xfe")),
    "prompts-json": (TEACHER.replace("prompts.txt", "p.json"), "wanted a JSON list of texts", lambda here: (here / "p.json").write_text('["a", 3]')),
    "prompts-json-torn": (TEACHER.replace("prompts.txt", "p.json"), "not valid JSON", lambda here: (here / "p.json").write_text('["a"')),
    "prompts-left-out": ("sample --model flux --out x.npz", "flux is a FluxTransformer2DModel of diffusers, which its pipeline draws: give --prompts", None),
    "prompts-left-out-run": ("sample --model runs/student --out x.npz", "give --prompts FILE", None),
    "prompts-left-out-bench": ("bench runs/student", "give --prompts FILE", None),
    "class-model": (TEACHER.replace("flux", "digits"), "digits is no transformer of diffusers", None),
    "class-model-size": ("sample --model digits --height 16 --out x.npz", "--height is for prompts that a pipeline draws, and --prompts names no texts", None),
    "class-model-guidance": ("sample --model digits --guidance 0.5 --out x.npz", "sample.guidance must be at least 1; got 0.5", None),
    "model-gone": (TEACHER.replace("flux", "gone"), "no model at gone", None),
    "pipeline-unknown": (TEACHER.replace("flux", "alone"), "alone names no pipeline: give --pipeline", lambda here: shutil.copytree(here / "runs/student/student", here / "alone")),
    "pipeline-gone": (f"{STUDENT} --pipeline gone", "no pipeline at gone", None),
    "pipeline-no-index": (f"{STUDENT} --pipeline runs", "runs is no pipeline of diffusers", None),
    "pipeline-of-another": (f"{STUDENT} --pipeline wan", "runs/student is a FluxTransformer2DModel, and wan has as transformers: transformer Wan", None),
    "pipeline-of-another-width": (f"{STUDENT} --pipeline wide", "does not fit wide: its time_text_embed.text_embedder.linear_1.weight is [32, 32]", wider),
    "teacher-gone": (STUDENT, "was pruned from gone, and no pipeline at gone: no such folder, and it is no hub id: give --pipeline", of_another_teacher),
    "component-unknown": (f"{TEACHER} --component transformer_3", "flux has no transformer transformer_3", None),
    "component-ambiguous": ("sample --model alone --pipeline wan --prompts prompts.txt --out x.npz", "wan has 2 of a WanTransformer3DModel: give --component",
                            lambda here: shutil.copytree(here / "runs/expert/student", here / "alone")),
    "component-missing": (TEACHER, "flux lacks its component vae/, a AutoencoderKL", lambda here: shutil.rmtree(here / "flux/vae")),
    "component-without-weights": (TEACHER, "diffusers does not open flux as a FluxPipeline", lambda here: (here / "flux/vae/diffusion_pytorch_model.safetensors").unlink()),
    "tokenizer-without-length": (TEACHER, "a FluxPipeline cannot be called with a prompt: int too big", lambda here: (here / "flux/tokenizer/tokenizer_config.json").unlink()),
    "autoencoder-with-a-gap": (TEACHER, "the weights in flux/vae do not go with its config.json: missing_keys decoder.conv_out.bias",
                               lambda here: without(here / "flux/vae/diffusion_pytorch_model.safetensors", "decoder.conv_out.bias")),
    "text-encoder-with-a-gap": (TEACHER, "the weights in flux/text_encoder do not go with its config.json: missing_keys",
                                lambda here: without(here / "flux/text_encoder/model.safetensors", "final_layer_norm.bias")),
    "component-of-code": (TEACHER, "code of a model is never run", lambda here: changed_json(here / "flux/model_index.json", vae=["my_vae", "Own"])),
    "pipeline-of-code": (TEACHER, "code of a model is never run", lambda here: changed_json(here / "flux/model_index.json", _class_name=["own", "Own"])),
    "pipeline-class-unknown": (TEACHER, "has no pipeline Flux9Pipeline", lambda here: changed_json(here / "flux/model_index.json", _class_name="Flux9Pipeline")),
    "pipeline-without-prompt": (TEACHER, "a DiTPipeline takes no prompt", dit_pipeline),
    "frames-of-images": (f"{TEACHER} --frames 5", "a FluxPipeline has no num_frames: leave that option out", None),
    "true-guidance-of-wan": (f"{VIDEO} --set pipeline.true_guidance=2", "a WanPipeline has no true_cfg_scale", None),
    "height-odd": (f"{TEACHER} --num-steps 1 --height 17 --width 16", "draws a height of 16 where --height is 17: give 16", None),
    "height-refused": (f"{VIDEO} --height 17 --width 16", "a WanPipeline cannot be called with a prompt and num_inference_steps 2", None),
    "height-negative": (f"{TEACHER} --height -8", "pipeline.height must be at least 1; got -8", None),
    "weights-not-finite": (f"{TEACHER} --num-steps 1 --height 16 --width 16", "not finite: the model is broken or unrecovered", lambda here: not_finite(here / "flux/transformer")),
    "out-no-npz": (TEACHER.replace("x.npz", "x.png"), "--out of sample is an .npz file", None),
    "out-of-others": (TEACHER, "exists and was not made by tinyfusion", lambda here: np.savez(here / "x.npz", arr_0=np.zeros(3))),
    "out-of-another-seed": (f"{TEACHER.replace('x.npz', 'teacher.npz')} {' '.join(FLUX)} --seed 1", "made with another recipe (seed: 0 there, 1 now)", None),
    "out-of-other-prompts": (f"{TEACHER.replace('x.npz', 'teacher.npz')} {' '.join(FLUX)}", "made with another recipe (prompts:", lambda here: (here / "prompts.txt").write_text("a dog")),
    "grid-no-png": (f"{TEACHER} --grid x.jpg", "--grid is a .png file", None),
    "bench-compile": (f"{BENCH} --compile", "--compile is for models of classes", None),
    "bench-vs-gone": (f"{BENCH} --vs gone", "no model at gone", None),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, place: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words, message, prepare = BAD[name]
    shutil.copytree(place, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    if prepare:
        prepare(Path())
    record = Path("runs/student/run.json")
    text = record.read_text().replace(str(place / "flux"), "flux")
    record.write_text(text)
    before = sorted(Path().rglob("*"))
    answer = run(*words.split())
    assert isinstance(answer, str) and answer.startswith("error: ") and message in answer, answer
    assert sorted(Path().rglob("*")) == before, "nothing was left behind"


def test_bad_inputs_are_distinct() -> None:
    assert len({words + str(prepare) for words, _, prepare in BAD.values()}) == len(BAD) >= 15


def test_the_source_of_a_pipeline_is_found(place: Path, tmp_path: Path) -> None:
    """A transformer folder within a pipeline, an exported pipeline, and a student alone with its pipeline."""
    student = place / "runs" / "student"
    inside = pipeline_of(str(place / "flux" / "transformer"), None)
    alone = pipeline_of(str(student / "student"), None, str(place / "flux"))
    words = ["prune", "--teacher", student, "--keep", "0,2,3", "--out", tmp_path / "again"]  # a student of a student
    assert cli.main(list(map(str, words))) == 0
    again = pipeline_of(str(tmp_path / "again"), None)
    assert (
        again.folder == place / "flux"
        and again.rest_hash == inside.rest_hash
        and again.models["transformer"].lineage[1:]
    )
    words = ["export", "--model", student, "--to", "diffusers", "--pipeline", "--out", tmp_path / "light"]
    assert cli.main(list(map(str, words))) == 0
    light = pipeline_of(str(tmp_path / "light"), None)
    found: list[ModelPipeline] = [inside, alone, light, pipeline_of(str(student), None)]
    assert [each.folder for each in found] == [place / "flux", place / "flux", tmp_path / "light", place / "flux"]
    assert [each.model_hash for each in found[1:]] == [found[-1].model_hash] * 3 and inside.model_hash != found[
        -1
    ].model_hash
    assert light.rest_hash == inside.rest_hash, "the same images can be drawn from either"
