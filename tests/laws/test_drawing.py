"""Sampling at scale: solvers against diffusers, the interval of guidance, half precision, parts, and what is streamed."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tinyfusion.conditioning.classes import class_condition
from tinyfusion.config.recipe import Recipe, SampleSection
from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Randomness
from tinyfusion.data.image_source import source_of, stream_images_npz, write_png_folder
from tinyfusion.families.dit.diffusers import config_of_arch, to_diffusers
from tinyfusion.jobs.sampling_setup import check_sampling, in_dtype, open_drawing, protocol
from tinyfusion.jobs.scoring import open_images
from tinyfusion.jobs.sharded_output import ImageShards, writing_shards
from tinyfusion.models.autoencoder import Autoencoder
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.processes.gaussian import Schedule
from tinyfusion.sample.drive import conditional, guided, image_labels, sample
from tinyfusion.sample.gaussian import GaussianSampler, sample_solver, solver_for

# of how diffusers makes arrays of tensors
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")
Factory = Callable[..., LoadedModel]
CPU = torch.device("cpu")


def start(model: LoadedModel, num: int, seed: int = 0) -> Tensor:
    """Initial noise as `sample` draws it."""
    shape = (model.arch.in_channels, model.arch.input_size, model.arch.input_size)
    return torch.from_numpy(Randomness(seed).at(0, 0, num).normal("sample-noise", shape))


# -------------------------------------------------------------------------------------------------------------- solvers


@pytest.mark.parametrize("name", ["dpm-solver++", "unipc"])
def test_solvers_know_the_process(name: str) -> None:
    """Their noise levels are those of our tables, and they begin at full noise."""
    solver = solver_for(name)
    assert np.allclose(solver.alphas_cumprod.numpy(), Schedule().alphas_cumprod, rtol=1e-5)
    solver.set_timesteps(20)
    assert int(solver.timesteps[0]) == 999 and len(solver.timesteps) == 20
    assert float(solver.sigmas[-1]) == 0


@pytest.mark.parametrize("name", ["dpm-solver++", "unipc"])
@pytest.mark.parametrize("num_steps", [1, 2, 10, 50])
def test_solvers_find_the_mean_of_a_gaussian(name: str, num_steps: int) -> None:
    """Data that is one point: the exact noise prediction leads there in any number of steps."""
    schedule, point = Schedule(), torch.full((2, 1, 2, 2), 0.3)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return schedule.noise_from_x0(x, t, point)

    x = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    steps = list(sample_solver(model, name, num_steps, x))
    assert len(steps) == num_steps
    assert torch.allclose(steps[-1], point, atol=1e-4)


@pytest.mark.parametrize("name", ["dpm-solver++", "unipc"])
def test_solvers_converge_to_ddim(tiny_model: Factory, name: str) -> None:
    """All solve one equation: with many steps they meet, and 20 steps are much nearer to it than 20 of DDIM."""
    model, labels = tiny_model(depth=2), image_labels(3, 5, 0)
    for parameter in model.module.parameters():
        parameter.data *= 0.3  # smooth, so that 500 steps are exact enough to be the judge

    def drawn(sampler: Any, num_steps: int) -> Tensor:
        settings = GaussianSampler(sampler, num_steps, 1.0)
        return torch.cat([batch.x for batch in sample(model, labels, settings, seed=0)])

    exact = drawn("ddim", 1000)
    error = {which: float((drawn(which, 20) - exact).norm() / exact.norm()) for which in ("ddim", name)}
    assert error[name] < 0.5 * error["ddim"]


@pytest.mark.parametrize("name", ["dpm-solver++", "unipc"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_latents_are_those_of_the_pipeline_of_diffusers(tiny_model: Factory, name: str, guidance: float) -> None:
    """`DiTPipeline` with their scheduler in it and our weights, from the same noise."""
    from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel

    model = tiny_model(in_channels=4, num_classes=1000, frequency_shift=1, mlp_norm_eps=1e-5)
    for parameter in model.module.parameters():
        parameter.data *= 0.3 if parameter.requires_grad else 1.0  # what the steps make of rounding stays small
    transformer = DiTTransformer2DModel(**config_of_arch(model.arch))  # type: ignore[no-untyped-call]
    transformer.eval().load_state_dict(to_diffusers(model.module.state_dict(), model.arch.depth))
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)  # type: ignore[no-untyped-call]
    seen: list[Tensor] = []
    vae.decode = lambda latents: (seen.append(latents), dataclasses.make_dataclass("Out", ["sample"])(latents))[1]
    pipeline = DiTPipeline(transformer, vae, solver_for(name))  # type: ignore[no-untyped-call]
    pipeline.set_progress_bar_config(disable=True)
    labels, noise = np.array([3, 998]), start(model, 2)

    def given(*_: Any, **__: Any) -> Tensor:
        return noise

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers.pipelines.dit.pipeline_dit.randn_tensor", given)
        pipeline(labels.tolist(), guidance_scale=guidance, num_inference_steps=10, output_type="pt")
    theirs = seen[0] * vae.config["scaling_factor"]
    settings = GaussianSampler(name, 10, guidance, "all")  # type: ignore[arg-type]
    ours = next(sample(model, labels, settings, seed=0)).x
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5


# ------------------------------------------------------------------------------------------------------------- guidance


def test_outside_of_its_interval_guidance_costs_and_changes_nothing(tiny_model: Factory) -> None:
    model, condition = tiny_model(), class_condition(torch.tensor([0, 3, 4]), 5)
    x, rows = start(model, 3), []
    model.module.register_forward_pre_hook(lambda _module, args: rows.append(len(args[0])))

    def share(t: float) -> float:
        return t / 999

    pieces = guided(model, condition, 3.0, 2, (0.25, 0.75), share), guided(model, condition, 3.0, 2)
    alone = conditional(model, condition)
    for t, inside in ((0, False), (249, False), (250, True), (749, True), (750, False), (999, False)):
        step = torch.full((3,), t)
        rows.clear()
        found = pieces[0](x, step)
        assert rows == [6 if inside else 3]
        assert torch.equal(found, (pieces[1] if inside else alone)(x, step))
    for t in (0, 999):
        assert torch.equal(
            guided(model, condition, 3.0, 2, (0.0, 1.0), share)(x, step := torch.full((3,), t)),
            pieces[1](x, step),
        )


@pytest.mark.parametrize("interval", [(0.5, 0.4), (-0.1, 1.0), (0.0, 1.1)])
def test_intervals_that_cannot_be_are_refused(interval: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="interval"):
        GaussianSampler(interval=interval)


@pytest.mark.parametrize(
    ("wrong", "message"), [({"num_steps": 1000}, "999"), ({"num_steps": 0}, "999"), ({"clip": True}, "clip")]
)
def test_solvers_refuse_what_they_cannot_do(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianSampler(**{"sampler": "unipc", "num_steps": 20, **wrong})


# ------------------------------------------------------------------------------------------------------ half precision


@pytest.mark.parametrize(("dtype", "rounding"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_half_precision_draws_the_same_images_up_to_its_rounding(
    tiny_model: Factory, dtype: str, rounding: float
) -> None:
    model, labels = tiny_model(), image_labels(4, 5, 0)
    for parameter in model.module.parameters():
        parameter.data *= 0.5
    half = in_dtype(model, dtype, CPU)
    assert {p.dtype for p in half.module.parameters()} == {getattr(torch, dtype)}
    assert {p.dtype for p in model.module.parameters()} == {torch.float32}, "the model itself stays as it is"
    settings = GaussianSampler("dpm-solver++", 8, 1.5)
    exact, found = (next(sample(m, labels, settings, seed=0)).x for m in (model, half))
    assert found.dtype == torch.float32
    assert 0 < float((found - exact).norm() / exact.norm()) < rounding


def test_the_protocol_says_how_it_was_computed(tiny_model: Factory) -> None:
    model = tiny_model()
    plain = protocol(Recipe(), model)
    assert plain.endswith("| float32 | seed 0") and " in [" not in plain
    settings = SampleSection(
        dtype="bfloat16", compile=True, guidance_interval=(0.1, 0.8), sampler="unipc", num_steps=20
    )
    text = protocol(Recipe(sample=settings), model)
    assert "| unipc 20 steps |" in text and " in [0.1, 0.8] |" in text and text.endswith("| bfloat16 compiled | seed 0")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's, while it compiles
def test_compiled_blocks_draw_the_same_images(tiny_model: Factory) -> None:
    recipe = Recipe(sample=SampleSection(num_images=4, num_steps=3, batch_size=2))
    model = tiny_model(depth=2, in_channels=3)
    plain = np.concatenate(list(open_drawing(recipe, model, CPU).images(0, 4)))
    assert plain.dtype == np.uint8
    compiled = dataclasses.replace(recipe, sample=dataclasses.replace(recipe.sample, compile=True))
    found = np.concatenate(list(open_drawing(compiled, model, CPU).images(0, 4)))
    assert np.abs(plain.astype(int) - found).max() <= 1


# -------------------------------------------------------------------------------------------------------------- decoding


def latent_model(tiny_model: Factory) -> LoadedModel:
    model = tiny_model(in_channels=4)
    return dataclasses.replace(model, facts=dataclasses.replace(model.facts, image_size=8, latent_scale=0.18215))


def test_latents_are_decoded_in_batches_by_the_published_rule(tiny_model: Factory) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    module = AutoencoderKL(block_out_channels=(4, 4), norm_num_groups=2, latent_channels=4, **kinds).eval()  # type: ignore[no-untyped-call]
    autoencoder = Autoencoder(module, "tiny", 0.18215, 0.0, 4, 2)
    model = latent_model(tiny_model)
    recipe = Recipe(sample=SampleSection(num_images=5, num_steps=2, batch_size=5, decode_batch_size=2))
    rows: list[int] = []
    module.decoder.register_forward_pre_hook(lambda _module, args: rows.append(len(args[0])))
    pixels = np.concatenate(list(open_drawing(recipe, model, CPU, autoencoder).images(0, 5)))
    assert rows == [2, 2, 1]
    raw = dataclasses.replace(recipe, sample=dataclasses.replace(recipe.sample, decode=False))
    latents = np.concatenate(list(open_drawing(raw, model, CPU).images(0, 5)))
    assert latents.dtype == np.float32 and latents.shape == (5, 4, 4, 4) and pixels.shape == (5, 8, 8, 3)
    with torch.no_grad():
        made = module.decode(torch.from_numpy(latents).permute(0, 3, 1, 2) / 0.18215).sample
    wanted = np.trunc(np.clip(127.5 * made.permute(0, 2, 3, 1).numpy() + 128, 0, 255))
    assert np.abs(pixels.astype(int) - wanted).max() <= 1


def test_pixel_models_have_nothing_to_decode(tiny_model: Factory) -> None:
    for settings, message in ((SampleSection(vae="x"), "draws pixels"), (SampleSection(decode=False), "draws pixels")):
        with pytest.raises(UserError, match=message):
            check_sampling(settings, tiny_model(in_channels=3))
    with pytest.raises(UserError, match="leave out one of the two"):
        check_sampling(SampleSection(decode=False, vae="x"), latent_model(tiny_model))


# ----------------------------------------------------------------------------------------------------------------- parts


def shards_in(folder: Path, num: int = 10, shard: int = 4) -> ImageShards:
    return ImageShards(folder / "x.npz.parts", (num, 2, 2, 1), np.dtype(np.uint8), shard)


def test_shards_cover_every_image_once_and_come_back_in_order(tmp_path: Path) -> None:
    images = np.arange(40, dtype=np.uint8).reshape(10, 2, 2, 1)
    shards = shards_in(tmp_path)
    assert shards.ranges() == [(0, 4), (4, 8), (8, 10)]
    with writing_shards(shards, {}, overwrite=False):
        for first, last in reversed(shards.ranges()):
            assert (first, last) in shards.missing()
            shards.write((first, last), images[first:last])
    assert shards.missing() == []
    assert np.array_equal(np.concatenate(list(shards.source().read(3))), images)
    assert shards.source().hash() == source_of(images).hash()
    shards.wait_for(shards.ranges(), 1, 0.0)


def test_a_shard_is_not_written_into_a_folder_that_was_removed(tmp_path: Path) -> None:
    shards = shards_in(tmp_path)
    with pytest.raises(UserError, match="was removed while it was being written"):
        shards.write((0, 4), np.zeros((4, 2, 2, 1), np.uint8))
    assert not shards.folder.exists()


_HEADERS = {"unclosed": b"((((", "nested": b"-" * 20_000 + b"1", "not Python": b"{'descr': '|u1', 'shape': 09}"}


@pytest.mark.parametrize("damage", ["cut", "empty", "other", "gone", *_HEADERS])
def test_damaged_shards_are_drawn_again(tmp_path: Path, damage: str) -> None:
    shards = shards_in(tmp_path)
    with writing_shards(shards, {}, overwrite=False):
        for first, last in shards.ranges():
            shards.write((first, last), np.zeros((last - first, 2, 2, 1), np.uint8))
    file = shards.file((4, 8))
    if damage == "gone":
        file.unlink()
    elif damage == "other":
        np.save(file, np.zeros((3, 2, 2, 1), np.uint8))
    elif damage in _HEADERS:
        header = _HEADERS[damage]
        file.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    else:
        file.write_bytes(b"" if damage == "empty" else file.read_bytes()[:-1])
    assert shards.missing() == [(4, 8)]
    with pytest.raises(
        UserError, match=r"1 of 3 files are missing .*0000004\.npy.* nothing was written for 0\.2 s: process 1 of 2"
    ):
        shards.wait_for(shards.ranges(), 2, 0.2)


# -------------------------------------------------------------------------------------------------------------- streaming


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_streamed_npz_is_that_of_numpy_bit_for_bit(tmp_path: Path, dtype: type) -> None:
    images = np.random.default_rng(0).integers(0, 256, (70, 3, 3, 2)).astype(dtype)
    labels = np.arange(70, dtype=np.int64)
    np.savez(tmp_path / "theirs.npz", images, labels)
    stream_images_npz(tmp_path / "ours.npz", source_of(images), labels)
    assert (tmp_path / "ours.npz").read_bytes() == (tmp_path / "theirs.npz").read_bytes()


def test_a_folder_of_pngs_reads_back_as_it_was(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (70, 4, 4, 3), dtype=np.uint8)
    write_png_folder(tmp_path / "png", source_of(images))
    assert sorted(p.name for p in (tmp_path / "png").iterdir())[-1] == "000069.png"
    assert np.array_equal(next(open_images(str(tmp_path / "png")).read(70)), images)


_STREAM = """
import resource, sys
from pathlib import Path
import numpy as np
from tinyfusion.jobs.sharded_output import ImageShards
from tinyfusion.jobs.drawn_output import write_samples
shards = ImageShards(Path(sys.argv[1]), (1024, 128, 128, 3), np.dtype(np.uint8), 64)
for shard in shards.ranges():
    with open(shards.file(shard), "wb") as file:
        np.save(file, np.full((64, 128, 128, 3), shard[0] % 251, np.uint8))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_samples(Path(sys.argv[2]), shards.source(), np.zeros(1024, np.int64), {})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kB on Linux alone")
def test_an_npz_is_never_whole_in_memory(tmp_path: Path) -> None:
    """48 MiB of images are put together with less than 12 MiB."""
    (tmp_path / "parts").mkdir()
    command = [sys.executable, "-c", _STREAM, str(tmp_path / "parts"), str(tmp_path / "x.npz")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (tmp_path / "x.npz").stat().st_size > 48 * 2**20
    assert int(done.stdout) < 12 * 1024
