"""How training calls the transformers of diffusers: the arguments that their pipelines give, the sign of every family, errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from call_goldens import GOLDENS, Golden, pipeline_calls
from torch import Tensor, nn

from tinyfusion.conditioning.condition import Condition
from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Randomness
from tinyfusion.families.diffusers_classes.call_rows import CALLS, call_of
from tinyfusion.families.diffusers_classes.calls import CallContext, called, weight_dtype
from tinyfusion.processes.base import Batch
from tinyfusion.processes.flow import Flow, FlowObjective

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers, about itself
OTHER = {"return_dict", "joint_attention_kwargs", "attention_kwargs"}
# three classes of diffusers read values of tensors, or name the type of autocast
_NOT_ON_META = ("Lumina2Transformer2DModel", "HiDreamImageTransformer2DModel", "ErnieImageTransformer2DModel")
META = [golden for golden in GOLDENS if golden.pipeline.model not in _NOT_ON_META and golden.tag != "control"]
MASKED = [golden for golden in GOLDENS if "mask" in golden.call.texts and not golden.tag]


def same(theirs: Any, ours: Any) -> bool:
    """Equality of nested arguments; masks may be of another type; times and angles are rounded otherwise."""
    if isinstance(theirs, Tensor) and isinstance(ours, Tensor):
        return theirs.shape == ours.shape and torch.allclose(theirs.float(), ours.float(), rtol=1e-6, atol=1e-6)
    if isinstance(theirs, Mapping):
        return theirs.keys() == ours.keys() and all(same(theirs[name], ours[name]) for name in theirs)
    if isinstance(theirs, Sequence) and not isinstance(theirs, str):
        return len(theirs) == len(ours) and all(map(same, theirs, ours))
    return bool(theirs == ours)


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda golden: golden.title)
def test_arguments_are_those_of_the_pipeline(golden: Golden) -> None:
    """Every argument at every step, with guidance or without; the prediction is what the pipeline unpacks; it has gradients."""
    pipeline = golden.built()
    if golden.context.get("time_per_token"):
        pipeline.register_to_config(expand_timesteps=True)
    context, num = golden.context_of(pipeline), 0
    run = called(golden.call, context)
    for num, made in enumerate(pipeline_calls(golden, pipeline), 1):  # noqa: B007
        x = torch.cat([made.x, *[tensor for name, tensor in made.condition.tensors.items() if name == "concat"]], 1)
        ours = golden.call.arguments(context, x, made.t, made.condition)
        theirs = {name: value for name, value in made.arguments.items() if name not in OTHER}
        assert {name for name, value in ours.items() if value is not None} <= {*theirs}
        assert [name for name in theirs if not same(theirs[name], ours.get(name))] == []
    assert num >= 2
    output = run(pipeline.transformer.train(), made.x, made.t, made.condition)
    torch.testing.assert_close(output, made.output, rtol=1e-4, atol=1e-4)
    assert output.shape[2:] == made.x.shape[2:]
    output.square().mean().backward()
    stacks = [each for each in pipeline.transformer.children() if isinstance(each, nn.ModuleList)]
    for block in (block for stack in stacks for block in stack):
        norms = [parameter.grad.norm() for parameter in block.parameters() if parameter.grad is not None]
        assert norms and torch.isfinite(torch.stack(norms)).all() and max(norms) > 0


def rows_of(golden: Golden, num: int = 2) -> tuple[Tensor, Condition]:
    """Random latents and texts for a family: rows of different lengths, where it takes masks."""
    tokens = int(golden.tiny.config.get("max_text_seq_length", 10))
    config, call, randoms = golden.tiny.config, golden.call, torch.Generator().manual_seed(1)
    channels = int(config.get("in_channels", 4)) // call.packed
    frames = (4,) if call.axes == 5 else ()
    x = torch.randn(num, channels, *frames, 8, 12, generator=randoms)
    width = {"embeddings": 1, "pooled": 1} | {
        name: int(np.atleast_1d(config.get(named, 0))[0]) for name, named in call.widths.items()
    }
    layers = (int(config["num_text_layers"]),) if "num_text_layers" in config else ()
    tensors = {"embeddings": torch.randn(num, tokens, *layers, width["embeddings"], generator=randoms)}
    if "mask" in call.texts:
        tensors["mask"] = torch.arange(tokens).expand(num, -1) < torch.tensor([6, 4])[:num, None]
    if "pooled" in call.texts:
        tensors["pooled"] = torch.randn(num, width["pooled"], generator=randoms)
    if "llama" in call.texts:
        tensors["llama"] = torch.randn(num, 3, tokens, int(config["caption_channels"][1]), generator=randoms)
    return x, Condition(tensors, {name: tensor[:1] * 0 for name, tensor in tensors.items()})


@pytest.mark.parametrize("golden", MASKED, ids=lambda golden: golden.title)
def test_texts_are_trimmed_where_that_changes_nothing(golden: Golden) -> None:
    """Texts of 6 and 4 of 10 tokens: the same as untrimmed, and as each of them alone without padding."""
    model, (x, condition) = golden.tiny.model(), rows_of(golden)
    context = CallContext({**golden.tiny.config, "_class_name": golden.pipeline.model}, **golden.context)
    t = torch.full((2,), 500) if golden.call.process == "gaussian" else golden.call.convention.at_sigma(torch.full((2,), 0.7))  # fmt: skip
    noise = condition["embeddings"] + 9 * ~condition["mask"].view(2, 10, *[1] * (condition["embeddings"].ndim - 2))
    loud = Condition({**condition.tensors, "embeddings": noise})  # what is masked must not matter
    run = called(golden.call, context)
    arguments = golden.call.arguments(golden.call.resolved(context), x, t, condition)
    texts = next(arguments[name] for name in ("encoder_hidden_states", "cap_feats", "text_bth") if name in arguments)
    assert max(map(len, texts)) == 6
    with torch.no_grad():
        trimmed = run(model, x, t, condition)
        untrimmed = called(golden.call, dataclasses.replace(context, trim=False))(model, x, t, loud)
        alone = [run(model, x[n : n + 1], t[:1], condition.index(slice(n, n + 1))) for n in range(2)]
    torch.testing.assert_close(trimmed, untrimmed, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(trimmed, torch.cat(alone), rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------------------------- sign and direction

# how the published models read time and velocity: time argument -> noise level, and the sign of noise - data
UNIT: tuple[Callable[[Tensor], Tensor], int] = (lambda t: t, 1)
THOUSANDTHS: tuple[Callable[[Tensor], Tensor], int] = (lambda t: t / 1000, 1)
PUBLISHED = {
    "FluxTransformer2DModel": UNIT, "Flux2Transformer2DModel": UNIT, "QwenImageTransformer2DModel": UNIT,
    "OvisImageTransformer2DModel": UNIT, "LongCatImageTransformer2DModel": UNIT, "Krea2Transformer2DModel": UNIT,
    "AuraFlowTransformer2DModel": UNIT, "BriaTransformer2DModel": THOUSANDTHS, "SD3Transformer2DModel": THOUSANDTHS,
    "SanaTransformer2DModel": THOUSANDTHS, "CogView4Transformer2DModel": THOUSANDTHS, "WanTransformer3DModel": THOUSANDTHS,
    "SkyReelsV2Transformer3DModel": THOUSANDTHS, "SanaVideoTransformer3DModel": THOUSANDTHS, "PRXTransformer2DModel": UNIT,
    "ErnieImageTransformer2DModel": THOUSANDTHS, "LTXVideoTransformer3DModel": THOUSANDTHS, "HunyuanVideoTransformer3DModel": THOUSANDTHS,
    "ZImageTransformer2DModel": (lambda t: 1 - t, -1), "Lumina2Transformer2DModel": (lambda t: 1 - t, -1),
    "HiDreamImageTransformer2DModel": (lambda t: t / 1000, -1),
}  # fmt: skip
FLOWS = [golden for golden in GOLDENS if golden.call.process == "flow" and not golden.tag and not golden.context]


class Exact(nn.Module):
    """A transformer that returns the velocity of its input; it reads time as the published model does.

    wanted: (noise level) -> hidden states in the layout of the class, and the velocity in it.
    """

    def __init__(self, name: str, layout: Callable[[Tensor], Any], x0: Tensor, noise: Tensor) -> None:
        super().__init__()
        self.name, self.layout, self.x0, self.noise = name, layout, x0, noise

    def forward(self, return_dict: bool, **given: Any) -> tuple[Any]:
        level, sign = PUBLISHED[self.name]
        time = next(given[name] for name in ("timestep", "timesteps", "t") if name in given)
        sigma = level(time).view(-1, *[1] * (self.x0.ndim - 1))
        wanted = self.layout((1 - sigma) * self.x0 + sigma * self.noise)
        assert same(wanted, given.get("hidden_states", given.get("x")))
        return (self.layout(sign * (self.noise - self.x0)),)


@pytest.mark.parametrize("golden", FLOWS, ids=lambda golden: golden.title)
def test_the_exact_velocity_has_no_loss(golden: Golden) -> None:
    """In the direction, scale and sign of every family; the same with the sign changed has a loss."""
    call, (x, condition) = golden.call, rows_of(golden)
    context = call.resolved(CallContext({**golden.tiny.config, "_class_name": golden.pipeline.model}))
    objective = FlowObjective(0.0, Flow(convention=call.convention), call=called(call, context))
    noisy = objective.draw(Batch(x, condition), Randomness(3).at(5, 0, 2))

    def layout(latents: Tensor) -> Any:
        arguments = call.arguments(context, latents, noisy.t, condition)
        return arguments.get("hidden_states", arguments.get("x"))

    model = Exact(golden.pipeline.model, layout, noisy.x0, noisy.noise)
    prediction = objective.predict(model, noisy)
    losses = objective.losses(model, noisy, prediction)
    assert prediction.output.shape == x.shape
    assert float(losses["loss"].max()) < 1e-10
    turned = dataclasses.replace(prediction, output=-prediction.output)
    assert float(objective.losses(model, noisy, turned)["loss"].min()) > 1


def test_every_flow_is_in_the_table_of_signs() -> None:
    assert {name for name, call in CALLS.items() if call.process == "flow"} == {*PUBLISHED}
    assert {golden.pipeline.model for golden in GOLDENS} == {*CALLS}


# ---------------------------------------------------------------------------------------------------------------- errors


def _flux() -> tuple[CallContext, Tensor, Condition]:
    golden = GOLDENS[0]
    x, condition = rows_of(golden)
    return CallContext({**golden.tiny.config, "_class_name": "FluxTransformer2DModel"}), x, condition


def _changed(condition: Condition, **tensors: Tensor | None) -> Condition:
    both = {**condition.tensors, **tensors}
    return Condition({name: tensor for name, tensor in both.items() if tensor is not None})


def _faults() -> Iterator[tuple[str, Tensor, Condition, str]]:
    _, x, condition = _flux()
    yield "pooled", x, _changed(condition, pooled=None), r"takes texts as embeddings, pooled; got embeddings, no pooled"
    yield "text", x, _changed(condition, embeddings=torch.zeros(2, 3, 7)), r"of width 32 \(joint_attention_dim\); got 7"
    yield (
        "pool",
        x,
        _changed(condition, pooled=torch.zeros(2, 5)),
        r"pooled of width 32 \(pooled_projection_dim\); got 5",
    )
    yield (
        "channels",
        x.repeat(1, 3, 1, 1),
        condition,
        r"in_channels 4 \(4 per channel of the latents\); got latents of 3",
    )
    yield "odd", x[..., :7], condition, r"patches of 2 x 2 cells; got 8 x 7"
    yield (
        "video",
        x[:, :, None],
        condition,
        r"takes latents \(images, channels, height, width\); got \[2, 1, 1, 8, 12\]",
    )


@pytest.mark.parametrize(("x", "condition", "said"), [pytest.param(*rest, id=name) for name, *rest in _faults()])
def test_latents_and_texts_of_another_model_are_refused(x: Tensor, condition: Condition, said: str) -> None:
    context, *_ = _flux()
    with pytest.raises(UserError, match=said):
        called(CALLS["FluxTransformer2DModel"], context)(nn.Identity(), x, torch.ones(2), condition)


def test_texts_of_another_length_are_refused_where_positions_are_counted() -> None:
    golden = next(each for each in GOLDENS if each.pipeline.model == "CogVideoXTransformer3DModel")
    x, condition = rows_of(golden)
    context = CallContext({**golden.tiny.config, "_class_name": golden.pipeline.model})
    short = _changed(condition, embeddings=condition["embeddings"][:, :7])
    with pytest.raises(UserError, match=r"takes texts of 8 tokens \(max_text_seq_length\); got 7"):
        called(golden.call, context)(nn.Identity(), x, torch.ones(2), short)


def test_a_class_without_a_call_is_refused() -> None:
    with pytest.raises(UserError, match="does not know how to call a ChromaTransformer2DModel; it calls AuraFlow"):
        call_of({"_class_name": "ChromaTransformer2DModel"})
    assert call_of({"_class_name": "SD3Transformer2DModel"}).process == "flow"


# ------------------------------------------------------------------------------------------------------- types and contexts


def test_inputs_have_the_type_of_the_weights_and_time_does_not() -> None:
    """Half-precision weights beside single-precision norms and adapters; the prediction keeps the module's type."""
    model = GOLDENS[0].tiny.model().to(torch.bfloat16).requires_grad_(False)
    model.norm_out.float()
    model.register_parameter("delta", nn.Parameter(torch.zeros(10**7)))
    assert weight_dtype(model) == torch.bfloat16
    model.norm_out.bfloat16()
    context, x, condition = _flux()
    seen: dict[str, torch.dtype] = {}
    model.register_forward_pre_hook(
        lambda _, __, given: seen.update({name: value.dtype for name, value in given.items() if isinstance(value, Tensor)}),
        with_kwargs=True,
    )  # fmt: skip
    output = called(CALLS["FluxTransformer2DModel"], context)(model, x, torch.ones(2), condition)
    assert output.dtype == seen["hidden_states"] == seen["pooled_projections"] == torch.bfloat16
    assert seen["timestep"] == seen["guidance"] == seen["img_ids"] == torch.float32


def test_an_image_beside_the_text() -> None:
    """Embeddings of an image for Wan; the constant that CogVideoX 1.5 takes with one."""
    wan, cog = (
        next(g for g in GOLDENS if g.pipeline.model == name)
        for name in ("WanTransformer3DModel", "CogVideoXTransformer3DModel")
    )
    changed = dataclasses.replace(wan, changes=dict(image_dim=16, added_kv_proj_dim=24))
    x, condition = rows_of(changed)
    run = called(wan.call, CallContext({**changed.tiny.config, "_class_name": wan.pipeline.model}))
    text, images = torch.zeros(2, 512, 16), torch.randn(2, 2, 257, 16, generator=torch.Generator().manual_seed(2))
    conditions = [_changed(condition, embeddings=text, image=image) for image in images]
    outputs = [run(changed.tiny.model(), x, torch.ones(2), each) for each in conditions]
    assert outputs[0].shape == x.shape
    assert not torch.equal(*outputs)
    changed = dataclasses.replace(cog, changes=dict(ofs_embed_dim=2))
    x, condition = rows_of(changed)
    run = called(cog.call, CallContext({**changed.tiny.config, "_class_name": cog.pipeline.model}))
    assert run(changed.tiny.model(), x, torch.tensor([3, 5]), condition).shape == x.shape


def test_guidance_of_the_condition_the_context_and_the_class() -> None:
    context, x, condition = _flux()
    call, t = CALLS["FluxTransformer2DModel"], torch.ones(2)

    def given(context: CallContext, condition: Condition) -> list[float]:
        return call.arguments(call.resolved(context), x, t, condition)["guidance"].tolist()

    assert given(context, condition) == [3.5, 3.5]
    assert given(dataclasses.replace(context, guidance=1.0), condition) == [1.0, 1.0]
    assert given(context, _changed(condition, guidance=torch.tensor([2.0, 5.0]))) == [2.0, 5.0]


@pytest.mark.parametrize("golden", META, ids=lambda golden: golden.title)
def test_calls_on_the_meta_device(golden: Golden) -> None:
    """Work and memory are counted there."""
    x, condition = rows_of(golden)
    context = CallContext({**golden.tiny.config, "_class_name": golden.pipeline.model}, **golden.context)
    run, module = called(golden.call, context), golden.tiny.model().to("meta")
    assert run(module, x.to("meta"), torch.ones(2, device="meta"), condition.to("meta")).shape[2:] == x.shape[2:]


def test_the_context_of_a_folder() -> None:
    ltx = {"spatio_temporal_scaling": [True, True, True, False], "patch_size": 4, "patch_size_t": 1}
    context = CallContext.of_folder({}, {"expand_timesteps": True}, ltx, guidance=2.0)
    assert (context.time_per_token, context.spatial_ratio, context.temporal_ratio, context.guidance) == (
        True,
        32,
        8,
        2.0,
    )
    plain = CallContext.of_folder({}, {}, {"block_out_channels": [1, 2, 3, 4]})
    assert (plain.time_per_token, plain.spatial_ratio, plain.temporal_ratio) == (False, 8, None)
    assert CALLS["CogView4Transformer2DModel"].resolved(CallContext({})).spatial_ratio == 8
