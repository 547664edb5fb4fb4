"""Width: what slicing does to a function, how channels are scored, and that a narrower model is a model like any other."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_training import save_checkpoint
from torch import Tensor, nn

from tinyfusion.blocks.plan import PrunePlan, plan_from_json
from tinyfusion.blocks.stack import num_parameters
from tinyfusion.blocks.widths import ChannelGroup, flat_kept, nested
from tinyfusion.cli import main
from tinyfusion.conditioning.classes import class_condition
from tinyfusion.config.recipe import PruneSection, RecoverSection, TrainingSection
from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Draws, Randomness
from tinyfusion.families.dit.model import DiT, DiTArch, published_arch
from tinyfusion.families.dit.width import narrower_dit, width_axes, width_groups
from tinyfusion.families.sizes import position_table
from tinyfusion.models.checkpoint import LoadedModel, open_model, save_model, shipped_models
from tinyfusion.processes.base import Batch, NoisyBatch
from tinyfusion.processes.gaussian import GaussianObjective, Schedule
from tinyfusion.prune.calibrate import Calibration
from tinyfusion.prune.context import CriterionContext
from tinyfusion.prune.criteria import by_indices
from tinyfusion.prune.width import (
    by_width,
    check_width,
    importance,
    most_important,
    summed_gradients,
    width_evaluations,
)
from tinyfusion.recover.align import block_pairs, residual_channels
from tinyfusion.recover.distill import distilled
from tinyfusion.training.checkpoints import load_latest
from tinyfusion.training.loop import train_steps
from tinyfusion.training.optim import ParameterGroup, trainable
from tinyfusion.training.state import TrainState

Models = Callable[..., LoadedModel]
Noisy = Callable[..., NoisyBatch]


def random_kept(model: LoadedModel, seed: int = 0, **sizes: int) -> dict[str, list[int]]:
    """Random channels of every group, by its name. sizes: residual, heads (per head), hidden; what is not named stays whole."""
    arch, rng = model.arch, np.random.default_rng(seed)
    kept: dict[str, list[int]] = {}
    for name, group in width_groups(arch).items():
        kind = {"condition": "residual", "timestep": "residual"}.get(name, name.partition(".")[0])
        run = group.size // group.sections
        num = sizes.get(kind, run)
        kept[name] = [
            s * run + int(i) for s in range(group.sections) for i in sorted(rng.choice(run, num, replace=False))
        ]
    return kept


def plan_with(model: LoadedModel, kept: dict[str, list[int]]) -> PrunePlan:
    depths = model.stack.depths()
    whole = {name: list(range(depth)) for name, depth in depths.items()}
    return PrunePlan(whole, depths, "width", teacher=model.hash(), kept_widths=nested(kept))


def narrowed(model: LoadedModel, seed: int = 0, **sizes: int) -> LoadedModel:
    return model.cut(plan_with(model, random_kept(model, seed, **sizes)))


@torch.no_grad()
def output(model: LoadedModel, noisy: NoisyBatch) -> Tensor:
    return GaussianObjective().predict(model.module, noisy).output


def count(arch: DiTArch) -> int:
    with torch.device("meta"):
        return num_parameters(DiT(arch))


# ------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(("share", "width", "published"), [(0.5, 816, 338e6), (0.25, 576, 169e6)])
def test_the_published_shares_of_the_largest_model(share: float, width: int, published: float) -> None:
    teacher = published_arch("DiT-XL/2")
    arch = narrower_dit(teacher, share)
    assert arch == dataclasses.replace(teacher, hidden_size=width), "the published form, 16 heads, depth 28"
    assert abs(count(arch) / published - 1) < 0.004, "table 1 of arXiv 2412.01199 gives whole millions"
    assert abs(count(arch) / (share * count(teacher)) - 1) < 0.02


ARCHS = st.builds(
    lambda heads, run, depth, hidden: DiTArch(8, 2, 1, 4 * heads * run, depth, heads, 10, mlp_hidden=hidden),
    st.integers(3, 6),
    st.integers(3, 5),
    st.integers(1, 2),
    st.none() | st.integers(120, 200),
)


@settings(max_examples=10)
@given(arch=ARCHS, share=st.floats(0.3, 1.0))
def test_a_narrower_arch_has_the_wanted_share(arch: DiTArch, share: float) -> None:
    found = narrower_dit(arch, share)
    assert abs(count(found) - share * count(arch)) <= 0.02 * share * count(arch)
    same_sizes = dict(hidden_size=arch.hidden_size, head_dim=arch.head_dim, mlp_hidden=arch.mlp_hidden)
    assert dataclasses.replace(found, **same_sizes) == arch, "only widths change"
    assert found.hidden_size <= arch.hidden_size and found.mlp_width <= arch.mlp_width
    assert found.head_width <= arch.head_width


@pytest.mark.parametrize("hidden", [None, 50])
def test_the_whole_model_is_a_share_too(hidden: int | None) -> None:
    arch = DiTArch(8, 2, 1, 24, 2, 3, 10, mlp_hidden=hidden)
    assert narrower_dit(arch, 1.0) == arch
    with pytest.raises(ValueError, match=r"no width of this model has 0\.001 of its parameters; the nearest is 0\.0"):
        narrower_dit(arch, 0.001)


def test_one_model_has_one_arch() -> None:
    plain = DiTArch(4, 2, 2, 16, 4, 2, 5)
    assert DiTArch(4, 2, 2, 16, 4, 2, 5, head_dim=8, mlp_hidden=64) == plain
    assert plain.head_dim is None and plain.head_width == 8 and plain.mlp_width == 64
    assert DiTArch(4, 2, 2, 16, 4, 3, 5, head_dim=5).head_width == 5, "heads need not divide a width of their own"
    for field in ("head_dim", "mlp_hidden"):
        with pytest.raises(ValueError, match=f"{field} must be at least 1"):
            dataclasses.replace(plain, **{field: 0})


def test_models_without_the_new_sizes_open_as_they_were(tiny_model: Models, tmp_path: Path) -> None:
    record = json.loads((shipped_models()["digits"] / "model.json").read_text())
    assert "head_dim" not in record["arch"], "the shipped model was made before widths could be cut"
    model = tiny_model(depth=1)
    save_model(model, tmp_path / "m")
    path = tmp_path / "m" / "model.json"
    record = json.loads(path.read_text())
    record["arch"] = {k: v for k, v in record["arch"].items() if k not in ("head_dim", "mlp_hidden")}
    path.write_text(json.dumps(record))
    again = open_model(tmp_path / "m")
    assert again.arch == model.arch and again.hash() == model.hash()


# ----------------------------------------------------------------------------------------------------------- slicing


@pytest.mark.parametrize("widened", [False, True])
def test_keeping_every_channel_is_the_same_function(tiny_model: Models, noisy_batch: Noisy, widened: bool) -> None:
    teacher = tiny_model(head_dim=5, mlp_hidden=40) if widened else tiny_model()
    student, noisy = narrowed(teacher), noisy_batch(teacher)
    assert torch.equal(output(student, noisy), output(teacher, noisy))
    assert student.hash() == teacher.hash() and student.arch == teacher.arch


def test_fewer_hidden_channels_are_zeroed_columns_of_fc2(tiny_model: Models, noisy_batch: Noisy) -> None:
    teacher = tiny_model()
    kept = random_kept(teacher, 1, hidden=23)
    student, masked = teacher.cut(plan_with(teacher, kept)), teacher.copy()
    with torch.no_grad():
        for i, block in enumerate(masked.module.get_submodule("blocks").children()):
            gone = sorted({*range(64)} - {*kept[f"hidden.blocks.{i}"]})
            block.get_parameter("mlp.fc2.weight")[:, gone] = 0
    assert student.arch == dataclasses.replace(teacher.arch, mlp_hidden=23)
    noisy = noisy_batch(teacher)
    torch.testing.assert_close(output(student, noisy), output(masked, noisy), rtol=1e-4, atol=1e-4)


def test_fewer_head_channels_are_zeroed_queries_keys_and_values(tiny_model: Models, noisy_batch: Noisy) -> None:
    """With the teacher's scale of the logits, folded into q: a DiT of 3 channels per head divides by sqrt(3), not sqrt(8)."""
    teacher = tiny_model()
    kept = random_kept(teacher, 2, heads=3)
    student, masked = teacher.cut(plan_with(teacher, kept)), teacher.copy()
    with torch.no_grad():
        for i, block in enumerate(masked.module.get_submodule("blocks").children()):
            for gone in sorted({*range(16)} - {*kept[f"heads.blocks.{i}"]}):
                for start in (0, 16, 32):
                    block.get_parameter("attn.qkv.weight")[start + gone] = 0
                    block.get_parameter("attn.qkv.bias")[start + gone] = 0
    assert student.arch == dataclasses.replace(teacher.arch, head_dim=3)
    noisy = noisy_batch(teacher)
    torch.testing.assert_close(output(student, noisy), output(masked, noisy), rtol=1e-4, atol=1e-4)


def test_slicing_everything_equals_masking_where_no_norm_mixes_channels(tiny_model: Models, noisy_batch: Noisy) -> None:
    """A layer norm sees fewer channels after slicing; without it the student is the teacher with zeros in the gaps."""
    teacher = tiny_model()
    kept = random_kept(teacher, 3, residual=8, heads=5, hidden=30)
    student, masked = teacher.cut(plan_with(teacher, kept)), teacher.copy()
    groups, tensors = width_groups(teacher.arch), masked.module.state_dict()
    with torch.no_grad():
        for name, axes in width_axes(teacher.arch).items():
            for dim, axis in enumerate(axes):
                if axis is not None:
                    size = groups[axis.group].size
                    channels = torch.arange(size * axis.repeats)
                    gone = channels[~torch.isin(channels % size, torch.tensor(kept[axis.group]))]
                    tensors[name].index_fill_(dim, gone, 0)
    for model in (student, masked):
        for path in [path for path, module in model.module.named_modules() if isinstance(module, nn.LayerNorm)]:
            parent, _, name = path.rpartition(".")
            setattr(model.module.get_submodule(parent), name, nn.Identity())
        model.module.double()  # without norms the values are large
        model.module.get_submodule("t_embedder.mlp").register_forward_pre_hook(lambda _, args: (args[0].double(),))
    noisy = noisy_batch(teacher)
    noisy = dataclasses.replace(noisy, xt=noisy.xt.double())
    torch.testing.assert_close(output(student, noisy), output(masked, noisy), rtol=1e-5, atol=1e-5)


BAD_KEPT: list[tuple[str, Any, str]] = [
    ("residual", [*range(15), 14], "residual must be different channels from 0 to 15"),
    ("residual", [*range(15), 16], "residual must be different channels from 0 to 15"),
    ("residual", [0, 1, 2], "hidden_size 3 is not a multiple of 4"),
    ("residual", [], "hidden_size must be at least 1"),
    ("residual", ["0"], "residual wants lists of channels"),
    ("residual", 3, "residual wants lists of channels"),
    ("condition", [0, 1], "condition keeps 2 channels where 16 are wanted"),
    ("heads", {"blocks": [[0, 1, 2, 8]] * 4}, "heads.blocks.0 must keep 2 channels of each 8"),
    ("heads", {"blocks": [[0, 1, 8]] * 4}, "3 channels cannot be shared out to 2 heads"),
    ("heads", {"blocks": [[0, 8]] * 3}, "groups of channels differ: heads.blocks.3"),
    ("hidden", {"blocks": [[0, 1]] * 3 + [[0]]}, "hidden.blocks.3 keeps 1 channels where 2 are wanted"),
    ("hidden", {"blocks": [[0, 1]] * 3 + [[-1, 0]]}, "hidden.blocks.3 must be different channels"),
    ("odd", [0], "groups of channels differ: odd"),
]


@pytest.mark.parametrize(("group", "value", "message"), BAD_KEPT)
def test_widths_that_do_not_fit_are_refused(tiny_model: Models, group: str, value: Any, message: str) -> None:
    teacher = tiny_model()
    plan = plan_with(teacher, random_kept(teacher))
    damaged = dataclasses.replace(plan, kept_widths={**(plan.kept_widths or {}), group: value})
    with pytest.raises(UserError, match=message):
        teacher.cut(damaged)


# -------------------------------------------------------------------------------------------------------- importance


@pytest.fixture
def criterion_context(tiny_model: Models, noisy_batch: Noisy) -> Callable[..., CriterionContext]:
    """criterion_context(share=0.5, threshold=1.0, steps="5"): a context to a tiny teacher over a short chain of timesteps."""

    def make(share: float = 0.5, threshold: float = 1.0, steps: str = "5") -> CriterionContext:
        teacher = tiny_model()
        objective = GaussianObjective(0.0, Schedule(steps))
        settings = PruneSection(
            criterion="width",
            width_share=share,
            width_threshold=threshold,
            calibration_images=6,
            calibration_batch_size=3,
        )
        batches = tuple(noisy_batch(teacher, 3, seed) for seed in (0, 1))
        return CriterionContext(teacher, settings, 7, Calibration(batches, objective, "random", 6, 6, 7))

    return make


def losses_and_gradients(context: CriterionContext) -> Iterator[tuple[float, dict[str, Tensor]]]:
    """Per timestep, by the book: x_t from the tables, squared error, one call of autograd."""
    model, fixed = context.teacher.module, context.images.batches[0]
    objective = context.images.objective
    assert isinstance(objective, GaussianObjective)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    for i, original in enumerate(objective.schedule.timesteps):
        share = float(objective.schedule.alphas_cumprod[i])
        xt = math.sqrt(share) * fixed.x0 + math.sqrt(1 - share) * fixed.noise
        found = model(xt, torch.full((3,), int(original)), fixed.condition["labels"])[:, :2]
        loss = ((found - fixed.noise) ** 2).mean()
        gradients = torch.autograd.grad(loss, [model.get_parameter(name) for name in names])
        yield float(loss.detach()), dict(zip(names, gradients, strict=True))


def test_importance_is_the_sum_of_w_times_g_elementwise(criterion_context: Callable[..., CriterionContext]) -> None:
    context = criterion_context(threshold=0.0)
    model = context.teacher.module
    steps = list(losses_and_gradients(context))
    taylor = {name: (model.get_parameter(name).detach() * sum(g[name] for _, g in steps)).abs() for name in steps[0][1]}
    width, inner, hidden = 16, 16, 64
    wanted: dict[str, Tensor] = {name: torch.zeros(g.size) for name, g in width_groups(context.teacher.arch).items()}
    for c in range(width):
        stream = taylor["x_embedder.proj.weight"][c].sum() + taylor["x_embedder.proj.bias"][c]
        stream += taylor["final_layer.linear.weight"][:, c].sum()
        condition = taylor["t_embedder.mlp.2.weight"][c].sum() + taylor["t_embedder.mlp.2.bias"][c]
        condition += taylor["y_embedder.embedding_table.weight"][:, c].sum()
        wanted["timestep"][c] = taylor["t_embedder.mlp.0.weight"][c].sum() + taylor["t_embedder.mlp.0.bias"][c]
        wanted["timestep"][c] += taylor["t_embedder.mlp.2.weight"][:, c].sum()
        for name, chunks in [("final_layer", 2)] + [(f"blocks.{i}", 6) for i in range(4)]:
            condition += taylor[f"{name}.adaLN_modulation.1.weight"][:, c].sum()
            for k in range(chunks):
                stream += taylor[f"{name}.adaLN_modulation.1.weight"][k * width + c].sum()
                stream += taylor[f"{name}.adaLN_modulation.1.bias"][k * width + c]
        for i in range(4):
            stream += (
                taylor[f"blocks.{i}.attn.qkv.weight"][:, c].sum() + taylor[f"blocks.{i}.mlp.fc1.weight"][:, c].sum()
            )
            for name in ("attn.proj", "mlp.fc2"):
                stream += taylor[f"blocks.{i}.{name}.weight"][c].sum() + taylor[f"blocks.{i}.{name}.bias"][c]
        wanted["residual"][c], wanted["condition"][c] = stream, condition
    for i in range(4):
        for c in range(inner):
            rows = [c, inner + c, 2 * inner + c]
            attention = (
                taylor[f"blocks.{i}.attn.qkv.weight"][rows].sum() + taylor[f"blocks.{i}.attn.qkv.bias"][rows].sum()
            )
            wanted[f"heads.blocks.{i}"][c] = attention + taylor[f"blocks.{i}.attn.proj.weight"][:, c].sum()
        for c in range(hidden):
            mlp = taylor[f"blocks.{i}.mlp.fc1.weight"][c].sum() + taylor[f"blocks.{i}.mlp.fc1.bias"][c]
            wanted[f"hidden.blocks.{i}"][c] = mlp + taylor[f"blocks.{i}.mlp.fc2.weight"][:, c].sum()

    plan = by_width(context)
    assert plan.scores["losses"] == pytest.approx([loss for loss, _ in steps], rel=1e-5)
    for name, values in wanted.items():
        found: Any = plan.scores
        for part in name.split("."):
            found = found[int(part) if part.isdigit() else part]
        torch.testing.assert_close(torch.tensor(found), values, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.9, 1.0])
def test_timesteps_end_after_the_first_small_loss(
    criterion_context: Callable[..., CriterionContext], threshold: float
) -> None:
    context = criterion_context(threshold=threshold, steps="20")
    all_losses = [loss for loss, _ in losses_and_gradients(context)]
    small = [t for t, loss in enumerate(all_losses) if loss < threshold * max(all_losses[: t + 1])]
    wanted = all_losses[: small[0] + 1] if small else all_losses
    copy = context.teacher.copy()
    objective = context.images.objective
    assert isinstance(objective, GaussianObjective)
    found = list(summed_gradients(copy.module, objective, context.images.batches[0], threshold))
    assert found == pytest.approx(wanted, rel=1e-5)
    assert (len(found) < 20) is bool(small)
    if threshold == 1.0:
        assert small, "this teacher is no better at one timestep than at any earlier one"
    assert set(importance(copy.module, *_rules(copy))) == set(width_groups(copy.arch))


def _rules(model: LoadedModel) -> tuple[Any, Any]:
    return model.family.widths, model.arch


def test_the_best_of_each_section_stay_and_the_earlier_of_equals() -> None:
    scores = torch.tensor([1.0, 5.0, 5.0, 5.0, 9.0, 8.0, 0.0, 7.0])
    assert most_important(scores, ChannelGroup(4, 2)) == [1, 2, 4, 5]
    assert most_important(scores, ChannelGroup(4)) == [1, 4, 5, 7]
    assert most_important(scores, ChannelGroup(8, 2)) == list(range(8))


def test_a_plan_of_widths_says_what_it_did_and_replays(
    criterion_context: Callable[..., CriterionContext], tiny_model: Models
) -> None:
    context = criterion_context()
    ticks: list[int] = []
    before = context.teacher.hash()
    plan = by_width(dataclasses.replace(context, tick=ticks.append))
    timesteps = len(plan.scores["losses"])
    assert plan.cost["images"] == 3 * timesteps and plan.seed == 7 and plan.teacher == before
    assert plan.scores["calibration"]["images"] == 3 and plan.scores["calibration"]["data"] == "random"
    assert len(ticks) == timesteps and 2 * width_evaluations(context) >= ticks[-1]
    assert context.teacher.hash() == before
    assert all(p.grad is None for p in context.teacher.module.parameters()), "the teacher is left as it was"
    again = plan_from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan and context.teacher.cut(again).hash() == context.teacher.cut(plan).hash()
    assert flat_kept(nested(flat_kept(plan.kept_widths))) == flat_kept(plan.kept_widths)
    with pytest.raises(UserError, match="was made for the model"):
        tiny_model(1).cut(plan)
    student = context.teacher.cut(plan)
    assert abs(num_parameters(student.module) / num_parameters(context.teacher.module) - 0.5) < 0.01
    with pytest.raises(UserError, match="num_keep 2 counts blocks"):
        check_width(context.teacher, dataclasses.replace(context.settings, num_keep=2))
    with pytest.raises(UserError, match=r"width_share: no width of this model has 0\.001"):
        by_width(criterion_context(share=0.001))


# --------------------------------------------------------------------------------------------- a model like any other


def test_a_narrower_model_is_written_and_opened(tiny_model: Models, tmp_path: Path) -> None:
    teacher = tiny_model()
    kept = random_kept(teacher, 4, residual=8, heads=3, hidden=20)
    student = teacher.cut(plan_with(teacher, kept))
    save_model(student, tmp_path / "m")
    again = open_model(tmp_path / "m")
    assert again.hash() == student.hash() and again.arch == student.arch and again.facts == student.facts
    table = again.module.get_parameter("pos_embed")
    assert torch.equal(table, position_table(16, 2)[:, :, kept["residual"]]) and not table.requires_grad
    assert not torch.equal(table, position_table(8, 2))
    assert [name for name, p in student.module.named_parameters() if not p.requires_grad] == ["pos_embed"]
    assert again.facts.lineage[0]["arch"] == dataclasses.asdict(teacher.arch)
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    save_file({**tensors, "pos_embed": position_table(8, 2)}, tmp_path / "m" / "model.safetensors")
    with pytest.raises(UserError, match="do not give the hash"):
        open_model(tmp_path / "m")


def test_formats_that_cannot_hold_a_model_are_named_with_the_reason(tiny_model: Models) -> None:
    teacher = tiny_model()
    assert teacher.unfit_formats() == {}
    proportional = narrowed(teacher, residual=8, heads=4, hidden=32)
    assert proportional.arch == dataclasses.replace(teacher.arch, hidden_size=8)
    assert list(proportional.unfit_formats()) == ["diffusers"], "an official file stores the position table"
    assert "position table" in proportional.unfit_formats()["diffusers"]
    heads, hidden = narrowed(teacher, heads=3).unfit_formats(), narrowed(teacher, hidden=40).unfit_formats()
    assert list(heads) == list(hidden) == ["official", "diffusers"]
    assert "attention is 6 channels wide and its stream 16" in heads["official"]
    assert "hidden layers have 40 channels; the format has 4 x 16" in hidden["diffusers"]
    wide = tiny_model(hidden_size=384, num_heads=4, depth=1)
    assert "4 heads, which the file does not say, and readers take 6" in wide.unfit_formats()["official"]


def test_depth_and_width_are_cut_in_any_order(tiny_model: Models, noisy_batch: Noisy) -> None:
    """The same function either way, and the teacher's channels of a grandchild are found through both."""
    teacher = tiny_model()
    kept = random_kept(teacher, 5, residual=12, heads=5, hidden=20)
    shorter = {name: v for name, v in kept.items() if not name.endswith((".1", ".2"))}
    shorter = {name.replace(".3", ".1"): v for name, v in shorter.items()}
    narrow, shallow = teacher.cut(plan_with(teacher, kept)), teacher.cut(by_indices(teacher, [0, 3]))
    first, second = narrow.cut(by_indices(narrow, [0, 3])), shallow.cut(plan_with(shallow, shorter))
    both = dataclasses.replace(plan_with(teacher, kept), kept={"blocks": [0, 3]})
    assert first.hash() == second.hash() == teacher.cut(both).hash() and first.arch == second.arch
    assert len(first.stack) == 2 and output(first, noisy_batch(teacher)).abs().max() > 0
    for student in (first, second, narrow):
        assert residual_channels(student, teacher) == kept["residual"]
    assert residual_channels(second, shallow) == kept["residual"] and residual_channels(first, narrow) is None
    assert residual_channels(shallow, teacher) is None
    assert residual_channels(second, narrow) is None, "cousins with the same channels"
    assert residual_channels(second, shallow) == residual_channels(narrow, shallow)
    with pytest.raises(UserError, match="residual channels that the teacher lacks"):
        residual_channels(shallow, narrow)


def test_channels_compose_along_a_chain_of_widths(tiny_model: Models) -> None:
    teacher = tiny_model()
    child = narrowed(teacher, 1, residual=12)
    grandchild, sibling = narrowed(child, 2, residual=4), narrowed(child, 3, residual=8)
    of_child = [residual_channels(m, child) or [] for m in (grandchild, sibling)]
    to_teacher = residual_channels(child, teacher) or []
    assert residual_channels(grandchild, teacher) == [to_teacher[c] for c in of_child[0]]
    if set(of_child[0]) <= set(of_child[1]):
        assert residual_channels(grandchild, sibling) == [of_child[1].index(c) for c in of_child[0]]
    else:
        with pytest.raises(UserError, match="give their common ancestor"):
            residual_channels(grandchild, sibling)
    weights = [m.module.get_parameter("pos_embed") for m in (grandchild, teacher)]
    assert torch.equal(weights[0], weights[1][:, :, residual_channels(grandchild, teacher)])


def test_features_are_compared_on_the_kept_residual_channels(tiny_model: Models, noisy_batch: Noisy) -> None:
    teacher = tiny_model()
    student, noisy = narrowed(teacher, 6, residual=8, heads=4, hidden=32), noisy_batch(teacher)
    assert student.facts.plan is not None
    channels = residual_channels(student, teacher)
    objective = GaussianObjective()
    for method, sigmas in (("rep-kd", None), ("masked-kd", 2.0)):
        settings = RecoverSection(method=method)  # type: ignore[arg-type]  # a name of the table
        goal = distilled(settings, objective, teacher, student, block_pairs(student.facts.plan), channels)
        assert goal.sigmas == sigmas
        with torch.no_grad(), teacher.stack.tap([0, 1, 2, 3]) as taught, student.stack.tap([0, 1, 2, 3]) as own:
            terms = goal.losses(student.module, noisy, goal.predict(student.module, noisy))
        losses = []
        for i in range(4):
            s, t = own[i].flatten(1), taught[i][:, :, channels].flatten(1)
            calm = [(x - x.mean(1, keepdim=True)).abs() < (sigmas or math.inf) * x.std(1, keepdim=True) for x in (s, t)]
            losses.append((calm[0] * s - calm[1] * t).square().mean(1))
        torch.testing.assert_close(terms["feat_loss"], torch.stack(losses).mean(0))
        assert goal.feature_loss(taught[0][:, :, channels], taught[0]).abs().max() == 0
    goal = distilled(RecoverSection(method="logits-kd"), objective, teacher, student, [(i, i) for i in range(4)])
    assert "feat_loss" not in goal.losses(student.module, noisy, goal.predict(student.module, noisy))


def test_training_a_narrower_model_stops_and_goes_on(tiny_model: Models, noisy_batch: Noisy, tmp_path: Path) -> None:
    student = narrowed(tiny_model(depth=1), 7, residual=8, heads=3, hidden=30)
    settings = TrainingSection(steps=4, batch_size=3, checkpoint_every_steps=2)
    objective, noisy = GaussianObjective(), noisy_batch(student)

    def source(step: int, size: int, draws: Draws) -> Batch:
        return Batch(noisy.x0, class_condition(noisy.condition["labels"].clamp(max=4), 5))

    def train(model: LoadedModel, state: TrainState, until: int) -> LoadedModel:
        made = dataclasses.replace(settings, stop_after=until)
        list(train_steps(state, objective, source, made, Randomness(0)))
        return model

    def begun(model: LoadedModel) -> tuple[LoadedModel, TrainState]:
        return model, TrainState(model.module, [ParameterGroup(trainable(model.module))], settings)

    save_model(student, tmp_path / "m")
    whole, state = begun(open_model(tmp_path / "m"))
    train(whole, state, 2)
    save_checkpoint(tmp_path / "checkpoints", state, 1)
    train(whole, state, 4)
    again, state = begun(open_model(tmp_path / "m"))
    assert load_latest(tmp_path / "checkpoints", state) == 2
    assert train(again, state, 4).hash() == whole.hash() != student.hash()
    save_model(whole, tmp_path / "trained")
    assert open_model(tmp_path / "trained").hash() == whole.hash()


# the smallest teacher on real data: threshold 1 ends the timesteps at the first loss that falls
PRUNE = (
    "prune --teacher teacher --criterion width --out cut --set prune.width_share=0.5 --set prune.width_threshold=1 "
    "--set prune.calibration_images=8 --set prune.calibration_batch_size=8"
)
SHORT = (
    "--set recover.training.steps=2 --set recover.training.batch_size=4 --set recover.training.checkpoint_every_steps=1"
)


def test_from_the_command_line(
    tiny_model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    teacher = tiny_model(input_size=8, patch_size=4, in_channels=1, depth=2, num_classes=10, hidden_size=32)
    save_model(teacher, tmp_path / "teacher")
    for command in (
        PRUNE,
        f"recover --student cut --method finetune --out tuned {SHORT}",
        f"recover --student cut --teacher teacher --method masked-kd --out taught {SHORT}",
        "sample --model tuned --out x.npz --num-images 3 --set sample.num_steps=2",
        "inspect taught --json",
    ):
        assert main(command.split()) == 0, capfd.readouterr().err
    facts = json.loads(capfd.readouterr().out.splitlines()[-1])
    plan = plan_from_json(json.loads((tmp_path / "cut" / "plan.json").read_text()))
    student = open_model(tmp_path / "cut")
    assert plan.kept_widths is not None and len(plan.kept_widths["residual"]) == facts["arch"]["hidden_size"] < 32
    assert abs(num_parameters(student.module) / num_parameters(teacher.module) - 0.5) < 0.01
    assert facts["depth"] == 2 and facts["criterion"] == "width" and facts["kept"] == {"blocks": [0, 1]}
    assert teacher.cut(plan).hash() == student.hash() != facts["hash"]
    assert np.load(tmp_path / "x.npz")["arr_0"].shape == (3, 8, 8, 1)


def test_a_narrower_student_that_its_destination_cannot_hold_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["prune", "--teacher", "digits", "--data", "digits", "--criterion", "width", "--for", "diffusers"]
    assert main([*command, "--out", str(tmp_path / "out"), "--dry-run"]) == 2
    assert "the model cannot be made for diffusers: its hidden layers have" in capsys.readouterr().err
