"""Prune your own transformer: learn which blocks to drop, prune it, recover it by distillation. Nothing is written to disk.

    python examples/own_model.py [--steps 200]

Its blocks take keyword arguments, one of them a rotary table shared by all images.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import tinyfusion as tf


class Block(nn.Module):  # noqa: D101
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, *, hidden: Tensor, rope: Tensor) -> Tensor:  # noqa: D102
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(self.norm(hidden)).chunk(3, -1))
        q, k = (torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * rope).flatten(-2) for x in (q, k))
        return hidden + self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class Model(nn.Module):  # noqa: D101
    def __init__(self, width: int = 16, depth: int = 6, tokens: int = 9) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(4, width), nn.Linear(width, 4)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        angles = torch.arange(tokens)[:, None] / 100 ** torch.linspace(0, 1, width // 4)
        self.register_buffer("angles", angles, persistent=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:  # noqa: D102
        hidden, rope = self.enter(x) + t[:, None, None], torch.polar(torch.ones_like(self.angles), self.angles)
        for layer in self.layers:
            hidden = layer(hidden=hidden, rope=rope)
        return self.leave(hidden)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    training = tf.TrainingSection(steps=parser.parse_args().steps, learning_rate=1e-3, ema_decay=0.95)
    data = [(torch.randn(32, 9, 4), torch.rand(32), torch.randn(32, 9, 4)) for _ in range(8)]  # x, t, target

    task = tf.Task(lambda model, batch: model(*batch[:2]), lambda out, batch: (out - batch[2]).square().mean((1, 2)))
    teacher = tf.wrap_module(Model(), {"layers": tf.Streams(("hidden",), axes={"rope": None})})
    masks = tf.learn_masks(teacher, task, data, tf.PruneSection(scheme="1:2", training=training))
    student = tf.prune_model(teacher, masks)
    student = tf.recover_model(student, teacher, task, data, tf.RecoverSection(training=training))
    print(f"kept {masks.plan.kept}: {len(teacher.stack)} blocks became {len(student.module.layers)}")


if __name__ == "__main__":
    main()
