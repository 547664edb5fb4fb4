"""FLUX in little memory: checkpoints on two streams, packed and streamed teachers, low-rank recovery and its file for diffusers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_images import IMAGES

import tinyfusion as tf
from tinyfusion.blocks.plan import PrunePlan
from tinyfusion.blocks.stack import frozen
from tinyfusion.jobs.footprint import LiveBytes
from tinyfusion.models.loaded import LoadedModel
from tinyfusion.recover.sharing import lora_tensors
from tinyfusion.recover.storage import stored
from tinyfusion.training.packed import PackedLinear

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers, about itself
FLUX = next(each for each in IMAGES if each.name == "FluxTransformer2DModel")
TRAINING = tf.TrainingSection(steps=3, batch_size=2, learning_rate=1e-2, ema_decay=0.0)
CALL = FLUX.given(2)
IDS = {name: CALL[name] for name in ("img_ids", "txt_ids")}
BATCH = {name: value for name, value in CALL.items() if name not in IDS}


def wrapped() -> LoadedModel:
    from tinyfusion.blocks.streams import Streams

    both = Streams(
        ("hidden_states", "encoder_hidden_states"), ("encoder_hidden_states", "hidden_states"), "hidden_states",
        {"image_rotary_emb": None},
    )  # fmt: skip
    return tf.wrap_module(FLUX.model(), {"transformer_blocks": both, "single_transformer_blocks": both})


def output(model: LoadedModel) -> torch.Tensor:
    return model.module(**CALL, return_dict=False)[0]


def task() -> tf.Task:
    def loss(out: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return (out - batch["hidden_states"]).square().mean((1, 2))

    return tf.Task(lambda model, batch: model(**batch, **IDS, return_dict=False)[0], loss)


def pruned(model: LoadedModel) -> LoadedModel:
    depths = model.stack.depths()
    kept = {name: list(range(0, depth, 2)) for name, depth in depths.items()}
    return model.cut(PrunePlan(kept, depths, "indices", teacher=model.hash()))


def test_checkpoints_of_both_kinds_of_blocks_are_exact_and_save_memory() -> None:
    model = wrapped()
    for parameter in model.module.parameters():
        parameter.requires_grad_(True)
    results: dict[bool, Any] = {}
    for checkpointed in (False, True):
        model.module.zero_grad(set_to_none=True)
        with LiveBytes() as meter:
            if checkpointed:
                with model.stack.checkpointed():
                    out = output(model)
            else:
                out = output(model)
        retained = meter.now
        out.square().sum().backward()
        results[checkpointed] = retained, out.detach(), {n: p.grad for n, p in model.module.named_parameters()}
    (plain, values, gradients), (less, again, others) = results[False], results[True]
    assert less < 0.5 * plain and torch.equal(values, again)
    assert all(
        (a is None) == (others[n] is None) and (a is None or torch.equal(a, others[n])) for n, a in gradients.items()
    )


@pytest.mark.parametrize("storage", ["float8", "nf4", "streamed"])
def test_stored_flux_runs_under_every_storage(storage: str) -> None:
    model = wrapped()
    frozen(model.module)
    with torch.no_grad():
        plain = output(model)
        stored(model.module, model.stack, storage, torch.device("cpu"))
        found = output(model)
    if storage == "streamed":
        assert torch.equal(found, plain)
        return
    packed = [m for m in model.module.modules() if isinstance(m, PackedLinear)]
    left = [n for n, m in model.module.named_modules() if type(m) is torch.nn.Linear and "transformer_blocks" in n]
    assert packed and not left
    assert 0 < float((found - plain).norm() / plain.norm()) < (0.1 if storage == "float8" else 0.4)


@pytest.mark.parametrize("storage", ["own", "float8"])
def test_low_rank_recovery_of_flux(storage: Any) -> None:
    whole = wrapped()
    student = pruned(whole)
    settings = tf.RecoverSection(
        update="lora", lora_rank=2, lora_alpha=4.0, teacher_storage=storage, method="logits-kd",
        training=dataclasses.replace(TRAINING, learning_rate=1e-3),
    )  # fmt: skip
    before = {name: value.clone() for name, value in student.module.state_dict().items()}
    recovered = tf.recover_model(student, whole, task(), lambda step, draws: BATCH, settings)
    assert all(torch.equal(before[name], value) for name, value in student.module.state_dict().items())
    changed = [n for n, v in recovered.module.state_dict().items() if not torch.equal(v, before[n])]
    assert changed and all(name.endswith(".weight") for name in changed)
    with torch.no_grad():
        found = output(recovered)
    assert found.isfinite().all() and not torch.equal(found, output(student).detach())


def test_the_file_of_updates_loads_in_diffusers(tmp_path: Path) -> None:
    """As a user does: the student's class, `load_lora_adapter`; equal to the merged student."""
    from tinyfusion.recover.sharing import MergedUpdates
    from tinyfusion.training.lora import add_lora

    student = pruned(wrapped())
    work = student.copy()
    factors = add_lora(work.module, 2, 6.0, seed=1)
    with torch.no_grad():
        for index, factor in enumerate(factors.values()):
            factor.copy_(0.1 * torch.sin(torch.arange(factor.numel()) + index).view(factor.shape))
    tensors = lora_tensors(factors, 3.0)
    save_file(tensors, tmp_path / "lora.safetensors")
    merged = student.copy()
    with torch.no_grad():
        updates = MergedUpdates(dict(student.module.named_parameters()), factors, 3.0)
        for name, value in updates.items():
            merged.module.get_parameter(name).copy_(value)
        wanted = output(merged)
        torch.testing.assert_close(output(work), wanted, rtol=1e-3, atol=1e-4)
    plain = student.module
    plain.load_lora_adapter(load_file(tmp_path / "lora.safetensors"), prefix="transformer", adapter_name="recovered")
    with torch.no_grad():
        torch.testing.assert_close(plain(**CALL, return_dict=False)[0], wanted, rtol=1e-3, atol=1e-4)


def test_bfloat16_weights_train_flux() -> None:
    whole = wrapped()
    student = pruned(whole)
    training = dataclasses.replace(TRAINING, dtype="bfloat16", weights="bfloat16", learning_rate=1e-3)
    settings = tf.RecoverSection(method="logits-kd", training=training)
    seen = []
    recovered = tf.recover_model(
        student,
        whole,
        task(),
        lambda step, draws: BATCH,
        settings,
        on_step=lambda r: seen.append(float(r.terms["loss"])),
    )
    assert len(seen) == 3 and all(value == value for value in seen)
    assert {p.dtype for p in recovered.module.parameters()} == {torch.float32}
