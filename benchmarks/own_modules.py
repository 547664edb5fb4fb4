"""Modules that are no family's, in small, for `cuda_rehearsal.py`: that of `examples/own_model.py`, and a FLUX transformer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

import tinyfusion as tf


class Own:
    """A module, its batches and its loss. two_streams: that of FLUX instead of the example's."""

    def __init__(self, two_streams: bool, device: torch.device) -> None:
        sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
        from own_model import Model

        one = {"layers": tf.Streams(("hidden",), axes={"rope": None})}
        module, lists = flux() if two_streams else (Model(depth=2), one)
        self.model = tf.wrap_module(module.to(device), lists)
        self.task = tf.Task(self.output, lambda out, batch: (out - batch["target"]).square().mean((1, 2)))
        self.two_streams, self.device = two_streams, device

    def output(self, module: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The output of the module for a batch."""
        given = {name: value for name, value in batch.items() if name != "target"}
        if not self.two_streams:
            return module(**given)  # type: ignore[no-any-return]
        positions = {"img_ids": torch.zeros(9, 3, device=self.device), "txt_ids": torch.zeros(2, 3, device=self.device)}
        return module(**given, **positions, return_dict=False)[0]  # type: ignore[no-any-return]

    def batch(self, _step: int, draws: Any) -> dict[str, torch.Tensor]:
        """A batch on the host, from where it is moved."""
        x = {"target": torch.zeros(draws.num, 9, 4)}
        if not self.two_streams:
            return {**x, "x": torch.zeros(draws.num, 9, 4), "t": torch.zeros(draws.num)}
        return {
            **x, "hidden_states": torch.zeros(draws.num, 9, 4), "encoder_hidden_states": torch.zeros(draws.num, 2, 32),
            "pooled_projections": torch.zeros(draws.num, 32), "timestep": torch.zeros(draws.num),
        }  # fmt: skip


def flux() -> tuple[Any, dict[str, tf.Streams]]:
    """A small FLUX transformer."""
    from diffusers import FluxTransformer2DModel

    module = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    returns = ("encoder_hidden_states", "hidden_states")
    both = tf.Streams(("hidden_states", "encoder_hidden_states"), returns=returns, axes={"image_rotary_emb": None})
    return module, {"transformer_blocks": both, "single_transformer_blocks": both}
