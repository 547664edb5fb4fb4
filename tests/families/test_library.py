"""Transformers of diffusers in the library: opened, masks learned, pruned and recovered by a task of the caller."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_images import IMAGES

import tinyfusion as tf
from tinyfusion.core.errors import UserError
from tinyfusion.core.files import sha256_of

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers, about itself
TRAINING = tf.TrainingSection(steps=3, batch_size=2, learning_rate=1e-3, ema_decay=0.0)


def test_flux_learned_pruned_and_recovered(tmp_path: Path) -> None:
    """With both streams declared by the table; files on disk stay as they are, though tensors are mapped from them."""
    tiny = next(each for each in IMAGES if each.name == "FluxTransformer2DModel")
    original = tiny.model()
    original.save_pretrained(tmp_path / "flux")
    before = {file: sha256_of(file) for file in (tmp_path / "flux").iterdir()}
    teacher = tf.open_model(tmp_path / "flux")
    assert teacher.origin == {"kind": "FluxTransformer2DModel of diffusers", "path": str(tmp_path / "flux")}
    call = tiny.given(2)
    with torch.no_grad():
        assert torch.equal(teacher.module(**call, return_dict=False)[0], original(**call, return_dict=False)[0])

    def loss(output: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return (output - batch["hidden_states"]).square().mean((1, 2))

    ids = {
        name: call[name] for name in ("img_ids", "txt_ids")
    }  # shared by all images: part of the task, not of batches
    batch = {name: value for name, value in call.items() if name not in ids}
    task = tf.Task(lambda model, batch: model(**batch, **ids, return_dict=False)[0], loss)
    settings = tf.PruneSection(scheme="2:3;1:2", lora_rank=2, training=TRAINING)
    masks = tf.learn_masks(teacher, task, lambda step, draws: batch, settings)
    student = tf.prune_model(teacher, masks)
    assert list(teacher.stack.depths().values()) == [3, 4] and list(student.stack.depths().values()) == [2, 2]
    student = tf.recover_model(student, teacher, task, lambda step, draws: batch, tf.RecoverSection(training=TRAINING))
    assert student.module(**call, return_dict=False)[0].isfinite().all()
    assert before == {file: sha256_of(file) for file in (tmp_path / "flux").iterdir()}
    tf.save_model(student, tmp_path / "out")
    plain, info = type(original).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        assert torch.equal(plain(**call, return_dict=False)[0], student.module(**call, return_dict=False)[0])
    with torch.no_grad():
        teacher.module.get_parameter("x_embedder.weight").add_(1.0)
    with pytest.raises(UserError, match="was changed after it was opened"):
        tf.prune_model(teacher, masks)
    changed = teacher.with_weights(teacher.module.state_dict())
    assert changed.hash() != teacher.hash() and tf.prune_model(changed, [0, 2, 4, 6]).hash() != student.hash()
    again = tf.open_model(tmp_path / "out")
    assert again.hash() == student.hash()
    assert again.facts.plan == masks.plan


def test_each_tensor_keeps_its_type(tmp_path: Path) -> None:
    tiny = next(each for each in IMAGES if each.name == "SD3Transformer2DModel")
    tiny.model().to(torch.bfloat16).save_pretrained(tmp_path / "sd3")
    opened = tf.open_model(str(tmp_path / "sd3"))
    assert {tensor.dtype for tensor in opened.module.parameters()} == {torch.bfloat16}
    with pytest.raises(
        UserError, match="open_model does not read num_heads here: a SD3Transformer2DModel of diffusers"
    ):
        tf.open_model(tmp_path / "sd3", num_heads=2)
    with pytest.raises(UserError, match="open_model does not read weights here"):
        tf.open_model(tmp_path / "sd3", weights="raw")
