"""DiT: sizes, tables and numbers of the published model. Source of the numbers: arXiv 2212.09748 and its released code."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinyfusion.blocks.stack import num_parameters
from tinyfusion.conditioning.classes import class_condition
from tinyfusion.families.dit.model import SIZES, DiT, DiTArch, published_arch, timestep_features
from tinyfusion.families.sizes import position_table
from tinyfusion.models.checkpoint import LoadedModel, new_model
from tinyfusion.processes.base import NoisyBatch
from tinyfusion.processes.gaussian import GaussianObjective, Schedule, sample_ancestral, sample_ddim
from tinyfusion.sample.drive import guided

PUBLISHED_PARAMETERS = {  # total, trainable
    "DiT-XL/2": (675_129_632, 674_834_720),
    "DiT-XL/4": (675_074_432, 675_000_704),
    "DiT-XL/8": (675_683_072, 675_664_640),
    "DiT-L/2": (458_102_816, 457_840_672),
    "DiT-L/4": (458_053_760, 457_988_224),
    "DiT-L/8": (458_594_816, 458_578_432),
    "DiT-B/2": (130_512_416, 130_315_808),
    "DiT-B/4": (130_475_648, 130_426_496),
    "DiT-B/8": (130_881_536, 130_869_248),
    "DiT-S/2": (32_963_360, 32_865_056),
    "DiT-S/4": (32_945_024, 32_920_448),
    "DiT-S/8": (33_148_160, 33_142_016),
    "DiT-D19/2": (459_983_264, 459_688_352),
    "DiT-D14/2": (340_457_504, 340_162_592),
    "DiT-D7/2": (173_121_440, 172_826_528),
}


def on_meta(arch: DiTArch) -> DiT:
    with torch.device("meta"):
        return DiT(arch)


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_parameter_counts_to_the_unit(name: str) -> None:
    model = on_meta(published_arch(name))
    assert (num_parameters(model), num_parameters(model, trainable_only=True)) == PUBLISHED_PARAMETERS[name]


def test_every_published_size_is_counted() -> None:
    assert {name.partition("/")[0] for name in PUBLISHED_PARAMETERS} == set(SIZES)


def test_512_pixels_only_lengthen_the_position_table() -> None:
    small, large = (num_parameters(on_meta(published_arch("DiT-XL/2", side))) for side in (256, 512))
    assert large - small == (1024 - 256) * 1152


@pytest.mark.parametrize("name", ["DiT-M/2", "XL/2", "DiT-XL", "DiT-XL/two", ""])
def test_unknown_names_are_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match="DiT-XL.*DiT-XL/2"):
        published_arch(name)


@given(
    patch=st.sampled_from([1, 2, 3]), grid=st.integers(1, 4), channels=st.integers(1, 4), width=st.sampled_from([8, 16]),
    depth=st.integers(1, 3), classes=st.integers(1, 5), learn_sigma=st.booleans(),
)  # fmt: skip
def test_any_size_builds_counts_and_runs(
    patch: int, grid: int, channels: int, width: int, depth: int, classes: int, learn_sigma: bool
) -> None:
    arch = DiTArch(patch * grid, patch, channels, width, depth, 2, classes, learn_sigma)
    model = DiT(arch).eval()
    d, t, features = width, grid * grid, patch * patch * (2 if learn_sigma else 1) * channels
    embedders = t * d + channels * patch * patch * d + d + 256 * d + d + d * d + d + (classes + 1) * d
    assert num_parameters(model) == embedders + depth * (18 * d * d + 15 * d) + 2 * d * d + 2 * d + features * (d + 1)
    x = torch.zeros(2, channels, arch.input_size, arch.input_size)
    out = model(x, torch.tensor([0, 999]), torch.tensor([0, classes]))
    assert out.shape == (2, (2 if learn_sigma else 1) * channels, arch.input_size, arch.input_size)


@pytest.mark.parametrize("change", [{"input_size": 5}, {"num_heads": 3}, {"hidden_size": 18}, {"depth": 0}])
def test_sizes_that_do_not_fit_together_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        DiTArch(
            **{
                **dict(input_size=4, patch_size=2, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=3),
                **change,
            }
        )


def test_state_dict_has_the_official_keys_in_order(tiny_model: Callable[..., LoadedModel]) -> None:
    names = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"]
    linears = ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2"]
    linears_after = [f"blocks.{i}.{name}" for i in range(2) for name in names] + [
        "final_layer.linear",
        "final_layer.adaLN_modulation.1",
    ]
    wanted = ["pos_embed", *both(linears), "y_embedder.embedding_table.weight", *both(linears_after)]
    assert list(tiny_model(depth=2).module.state_dict()) == wanted


def both(names: list[str]) -> list[str]:
    return [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]


def test_position_table_has_the_published_values() -> None:
    table = position_table(1152, 16)[0].double()
    row1 = {
        0: 0.8414709848,
        1: 0.8240513478,
        287: 1.0324972132e-4,
        288: 0.5403023059,
        289: 0.5665151155,
        575: 0.9999999947,
        576: 0,
        864: 1,
    }
    row16 = {0: 0, 288: 1, 576: 0.8414709848, 577: 0.8240513478, 864: 0.5403023059}
    for row, values in ((1, row1), (16, row16)):
        for column, value in values.items():
            assert float(table[row, column]) == pytest.approx(value, abs=6e-8), (row, column)
    assert float(table.sum()) == pytest.approx(134598.94780388544, rel=1e-8)
    assert float((table**2).sum()) == pytest.approx(147456, rel=1e-8)
    expected = torch.tensor([0.84147098, 0.00999983, 0.54030231, 0.99995, 0, 0, 1, 1])
    torch.testing.assert_close(position_table(8, 2)[0, 1], expected, atol=1e-7, rtol=1e-6)


def test_timestep_features_have_the_published_values() -> None:
    zero, one = timestep_features(torch.tensor([0, 1]))
    assert float(zero.sum()) == 128.0
    values = {0: 0.54030234, 1: 0.59737533, 127: 1.0, 128: 0.84147096, 129: 0.80196178, 255: 1.0746076e-4}
    for index, value in values.items():
        assert float(one[index]) == pytest.approx(value, rel=1e-6), index


def test_a_fresh_model_outputs_exactly_zero() -> None:
    model = new_model(
        "dit", dict(input_size=8, patch_size=2, in_channels=3, hidden_size=32, depth=3, num_heads=4, num_classes=4), 7
    )
    out = model.module(torch.randn(2, 3, 8, 8), torch.tensor([0, 500]), torch.tensor([1, 4]))
    assert torch.equal(out, torch.zeros(2, 6, 8, 8))


def test_fresh_weights_depend_on_the_seed_alone(tiny_model: Callable[..., LoadedModel]) -> None:
    sizes = dataclasses.asdict(tiny_model().arch)
    torch.manual_seed(1)
    first = new_model("dit", sizes, 3)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert first.hash() == new_model("dit", sizes, 3).hash() != new_model("dit", sizes, 4).hash()
    assert torch.equal(torch.get_rng_state(), before), "the global generator is not ours"


def test_the_order_of_the_batch_does_not_matter(
    tiny_model: Callable[..., LoadedModel], noisy_batch: Callable[..., NoisyBatch]
) -> None:
    model = tiny_model()
    noisy, order = noisy_batch(model, 5), torch.tensor([3, 0, 4, 1, 2])
    out = model.module(noisy.xt, noisy.t, noisy.condition["labels"])
    shuffled = model.module(noisy.xt[order], noisy.t[order], noisy.condition["labels"][order])
    alone = model.module(noisy.xt[3:4], noisy.t[3:4], noisy.condition["labels"][3:4])
    torch.testing.assert_close(shuffled, out[order], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(alone, out[3:4], rtol=1e-5, atol=1e-6)


def test_inputs_of_another_shape_are_refused(tiny_model: Callable[..., LoadedModel]) -> None:
    with pytest.raises(ValueError, match=r"\(2, 4, 4\)"):
        tiny_model().module(torch.zeros(1, 2, 8, 8), torch.tensor([0]), torch.tensor([0]))


# ------------------------------------------------------------------------- numbers of the published implementation


@pytest.fixture(scope="module")
def student(published_tiny: Callable[[int, int], LoadedModel]) -> LoadedModel:
    return published_tiny(2, 0)


@torch.no_grad()
def test_published_forward_and_losses(student: LoadedModel, published_noisy: NoisyBatch) -> None:
    objective = GaussianObjective()
    prediction = objective.predict(student.module, published_noisy)
    out = prediction.output
    assert (float(out.sum()), float(out.abs().sum())) == pytest.approx((1.92385, 49.00121), abs=2e-5)
    assert [float(out[i]) for i in ((0, 0, 0, 0), (1, 3, 2, 1), (2, 7, 3, 3))] == pytest.approx(
        [0.1602088, 0.2582195, 0.1394105], abs=1e-6
    )
    terms = objective.losses(student.module, published_noisy, prediction)
    expected = {
        "mse": [0.4663153, 0.5324817, 0.5564290],
        "vb": [1.8626299, 0.00411271, 0.00819168],
        "loss": [2.3289452, 0.5365944, 0.5646207],
    }
    for name, values in expected.items():
        assert terms[name].tolist() == pytest.approx(values, rel=1e-5), name


@torch.no_grad()
def test_published_guidance(student: LoadedModel, published_noisy: NoisyBatch) -> None:
    x, t = published_noisy.xt[:1], torch.tensor([500])
    first = guided(student, class_condition(torch.tensor([2]), 5), 1.5, 3)(x, t)
    rest = student.module(x, t, torch.tensor([5]))[:, 3:]
    conditional = [0.0060087, 0.1266743, -0.1253146, 0.1500342, 0.0153983, -0.1966723, 0.1251390, -0.0568460]
    assert first[0, :, 1, 2].tolist() == pytest.approx(conditional, abs=1e-6)
    assert rest[0, :, 1, 2].tolist() == pytest.approx(
        [0.1511479, 0.0139821, -0.1959729, 0.1256597, -0.0582121], abs=1e-6
    )
    assert float(2 * first[:, :3].sum() + first[:, 3:].sum() + rest.sum()) == pytest.approx(1.33906, abs=2e-5)


class From(Schedule):
    """The last `num` steps of a respaced chain, so that a sampler's first step is index num - 1."""

    def __init__(self, spacing: str, num: int) -> None:
        super().__init__(spacing)
        self.num = num

    def __len__(self) -> int:
        return self.num


@torch.no_grad()
@pytest.mark.parametrize(
    ("sampler", "index", "total", "first"),
    [
        ("ddpm", 7, 3.78270, [2.3311863, 1.2369606, -0.5400298]),
        ("ddim", 7, 3.92900, [1.5289554, 1.4160484, 0.4286553]),
        ("ddim eta 1", 7, 3.78075, None),
        ("ddpm", 0, 2.86534, None),
        ("ddim", 0, 2.86534, None),
        ("ddim eta 1", 0, 2.86534, None),
    ],
)
def test_published_sampling_steps(
    student: LoadedModel, published_noisy: NoisyBatch, sampler: str, index: int, total: float, first: list[float] | None
) -> None:
    x, noise = published_noisy.xt[1:2], torch.cos(1.7 * torch.arange(64, dtype=torch.float64)).float().view(1, 4, 4, 4)
    arguments: tuple[Any, ...] = (
        lambda x, t: student.module(x, t, torch.tensor([3])),
        From("10", index + 1),
        x,
        lambda _: noise,
    )
    if sampler == "ddpm":
        made = next(sample_ancestral(*arguments))
    else:
        made = next(sample_ddim(*arguments, eta=1.0 if sampler.endswith("1") else 0.0))
    assert float(made.sum()) == pytest.approx(total, abs=2e-5)
    if first:
        assert made.flatten()[:3].tolist() == pytest.approx(first, abs=1e-6)


@torch.no_grad()
def test_published_clean_image_of_a_respaced_step(student: LoadedModel, published_noisy: NoisyBatch) -> None:
    x, schedule = published_noisy.xt[1:2], Schedule("10")
    noise = student.module(x, torch.tensor([int(schedule.timesteps[7])]), torch.tensor([3]))[:, :4]
    assert float(schedule.x0_from_noise(x, torch.tensor([7]), noise).sum()) == pytest.approx(18.09304, abs=1e-4)
