"""The DiT of diffusers (`DiTTransformer2DModel`): names, sizes and configuration, to ours and back. Needs no diffusers.

Tensors are the same numbers under other names, with two differences of form. Queries, keys and values stand in three
tensors instead of one. And every block owns a copy of the timestep and label embedders, of which the head reads that of
block 0: reading ties them, which needs equal copies, and writing copies them.

Two things its class computes otherwise than the published model: timestep frequencies are 10000^(-i / 127) instead of
10000^(-i / 128), and the norm before an MLP has an epsilon that its configuration gives (1e-5 if it does not). Both are
fields of our `DiTArch`, so what is read from a folder of diffusers computes what diffusers computes. The position table is a
formula there and not stored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion.core.errors import UserError
from tinyfusion.families.dit.model import DiTArch, timestep_features
from tinyfusion.families.family import DiffusersExport, DiffusersPipeline
from tinyfusion.families.sizes import position_table

CLASS_NAME = "DiTTransformer2DModel"
_OLD_CLASS_NAME = "Transformer2DModel"  # in folders of 2022 and 2023, such as facebook/DiT-XL-2-256
GUIDED_CHANNELS = 3  # leading channels that published guidance touches
_PIPELINE_NULL_CLASS = 1000  # what DiTPipeline guides with, whatever the model
FREQUENCY_SHIFT = 1  # of the timestep features in its class
POSITION_BUFFER = "pos_embed.pos_embed"  # the table, in files of some versions

_OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_COPIED = {
    "t_embedder.mlp.0.weight": "timestep_embedder.linear_1.weight",
    "t_embedder.mlp.0.bias": "timestep_embedder.linear_1.bias",
    "t_embedder.mlp.2.weight": "timestep_embedder.linear_2.weight",
    "t_embedder.mlp.2.bias": "timestep_embedder.linear_2.bias",
    "y_embedder.embedding_table.weight": "class_embedder.embedding_table.weight",
}
_IN_BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
_ATTENTION = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
_KINDS = ("weight", "bias")


def _renamed(depth: int) -> Iterator[tuple[str, str]]:
    """(our name, their name) of every tensor that is the same on both sides."""
    for kind in _KINDS:
        yield from ((f"{ours}.{kind}", f"{theirs}.{kind}") for ours, theirs in _OUTSIDE.items())
        for i in range(depth):
            for ours, theirs in _IN_BLOCK.items():
                yield f"blocks.{i}.{ours}.{kind}", f"transformer_blocks.{i}.{theirs}.{kind}"


def to_diffusers(tensors: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The state dict of diffusers' class from ours, as views: nothing is copied, and embedders stand once per block."""
    theirs_by_name = {theirs: tensors[ours] for ours, theirs in _renamed(depth)}
    for i in range(depth):
        block = f"transformer_blocks.{i}"
        theirs_by_name |= {f"{block}.norm1.emb.{theirs}": tensors[ours] for ours, theirs in _COPIED.items()}
        for kind in _KINDS:
            parts = tensors[f"blocks.{i}.attn.qkv.{kind}"].chunk(3)
            theirs_by_name |= {f"{block}.{name}.{kind}": part for name, part in zip(_ATTENTION, parts, strict=True)}
    return theirs_by_name


def from_diffusers(tensors: Mapping[str, Tensor], arch: DiTArch) -> dict[str, Tensor]:
    """Our state dict from that of diffusers' class, position table included.

    tensors: exactly those that `to_diffusers` gives. Raises UserError where the copies of an embedder differ.
    """
    _check_copies(tensors, arch.depth)
    ours_by_name = {ours: tensors[theirs] for ours, theirs in _renamed(arch.depth)}
    ours_by_name |= {ours: tensors[f"transformer_blocks.0.norm1.emb.{theirs}"] for ours, theirs in _COPIED.items()}
    for i in range(arch.depth):
        for kind in _KINDS:
            parts = [tensors[f"transformer_blocks.{i}.{name}.{kind}"] for name in _ATTENTION]
            ours_by_name[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    ours_by_name["pos_embed"] = position_table(arch.hidden_size, arch.input_size // arch.patch_size)
    return ours_by_name


def _check_copies(tensors: Mapping[str, Tensor], depth: int) -> None:
    for theirs in _COPIED.values():
        first = tensors[f"transformer_blocks.0.norm1.emb.{theirs}"]
        apart = [i for i in range(1, depth) if not torch.equal(tensors[f"transformer_blocks.{i}.norm1.emb.{theirs}"], first)]  # fmt: skip
        if apart:
            others = f" (so in {len(apart)} of {depth} blocks)" if len(apart) > 1 else ""
            raise UserError(
                f"cannot be opened: transformer_blocks.{apart[0]}.norm1.emb.{theirs} differs from its copy in block 0{others}: "
                "the blocks were trained with embedders of their own, and a DiT has one for all"
            )


def wrong_table(tensors: Mapping[str, Tensor], arch: DiTArch) -> bool:
    """Whether a file stores a position table that is not the formula's in the type of the file, up to rounding."""
    stored = tensors.get(POSITION_BUFFER)
    if stored is None:
        return False
    if tuple(stored.shape) != (1, arch.num_tokens, arch.hidden_size):
        return True
    formula = position_table(arch.hidden_size, arch.input_size // arch.patch_size).to(stored.dtype)
    return not torch.allclose(stored.float(), formula.float(), atol=1e-5)


# ------------------------------------------------------------------------------------------------------ configuration

# what our DiT is, in their words: values that a configuration must have, and those of the class where it says nothing
_FIXED: dict[str, Any] = {
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "cross_attention_dim": None,
    "num_vector_embeds": None,
    "use_linear_projection": False,
    "only_cross_attention": False,
    "double_self_attention": False,
}
_SIZES = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
}


def is_config(config: Mapping[str, Any]) -> bool:
    """Whether a config.json of diffusers is of this class, or of an older one that holds a DiT."""
    kind = config.get("_class_name")
    norm = config.get("norm_type", _FIXED["norm_type"])
    return bool(kind == CLASS_NAME or (kind == _OLD_CLASS_NAME and norm == _FIXED["norm_type"]))


def arch_of_config(config: Mapping[str, Any]) -> DiTArch:
    """The sizes in a config.json. Raises UserError if it does not describe a DiT."""
    odd = next((name for name, value in _FIXED.items() if config.get(name, value) != value), None)
    if odd:
        raise UserError(f"has {odd} {config[odd]!r}; a DiT has {_FIXED[odd]!r}")
    sizes = {name: config.get(name, default) for name, default in _SIZES.items()}
    wrong = next((name for name, value in sizes.items() if type(value) is not int), None)
    if wrong:
        raise UserError(f"has {wrong} {sizes[wrong]!r}; wanted a whole number")
    eps = config.get("norm_eps", 1e-5)
    if type(eps) not in (float, int):
        raise UserError(f"has norm_eps {eps!r}; wanted a number")
    channels, out_channels = sizes["in_channels"], config.get("out_channels")
    out_channels = channels if out_channels is None else out_channels
    if out_channels not in (channels, 2 * channels):
        raise UserError(
            f"has out_channels {out_channels}; a DiT has {channels}, or {2 * channels} with learned variance"
        )
    return DiTArch(
        input_size=sizes["sample_size"],
        patch_size=sizes["patch_size"],
        in_channels=channels,
        hidden_size=sizes["num_attention_heads"] * sizes["attention_head_dim"],
        depth=sizes["num_layers"],
        num_heads=sizes["num_attention_heads"],
        num_classes=sizes["num_embeds_ada_norm"],
        learn_sigma=out_channels == 2 * channels,
        frequency_shift=FREQUENCY_SHIFT,
        mlp_norm_eps=float(eps),
    )


def config_of_arch(arch: DiTArch) -> dict[str, Any]:
    """The config.json of a DiT of these sizes."""
    return {
        "_class_name": CLASS_NAME,
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": arch.head_width,
        "dropout": 0.0,
        "in_channels": arch.in_channels,
        "norm_elementwise_affine": False,
        "norm_eps": arch.mlp_norm_eps,
        "norm_num_groups": 32,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": arch.num_heads,
        "num_embeds_ada_norm": arch.num_classes,
        "num_layers": arch.depth,
        "out_channels": arch.out_channels,
        "patch_size": arch.patch_size,
        "sample_size": arch.input_size,
        "upcast_attention": False,
    }


# format -> (arch -> the one with which the same tensors compute what its readers compute); diffusers reads the epsilon
ARCH_FOR: dict[str, Callable[[DiTArch], DiTArch]] = {
    "official": lambda arch: dataclasses.replace(arch, frequency_shift=0, mlp_norm_eps=1e-6),
    "diffusers": lambda arch: dataclasses.replace(arch, frequency_shift=FREQUENCY_SHIFT),
}
_READERS = {"official": "the published scripts", "diffusers": "the classes of diffusers"}


def differences(module: nn.Module, arch: DiTArch, target: str) -> list[str]:
    """What a reader of the format `target` ("official" or "diffusers") computes otherwise than this model, in sentences.

    Of timesteps in diffusers also by how much their embedding moves, over all 1000.
    """
    sentences, there = [], ARCH_FOR[target](arch)
    if arch.frequency_shift != there.frequency_shift:
        sentences.append(
            f"{_READERS[target]} compute timestep frequencies as 10000^(-i/{128 - there.frequency_shift}), this model "
            f"10000^(-i/{128 - arch.frequency_shift}){_embedding_shift(module, arch) if target == 'diffusers' else ''}"
        )
    if arch.mlp_norm_eps != there.mlp_norm_eps:
        sentences.append(
            f"{_READERS[target]} give the norm before an MLP the epsilon {there.mlp_norm_eps:g}, this model {arch.mlp_norm_eps:g}"
        )
    return sentences


@torch.no_grad()
def _embedding_shift(module: nn.Module, arch: DiTArch) -> str:
    steps, mlp = torch.arange(1000), module.get_submodule("t_embedder.mlp")
    here, there = (mlp(timestep_features(steps, shift)) for shift in (arch.frequency_shift, FREQUENCY_SHIFT))
    return (
        f": its images differ slightly there (the embedding of a timestep moves by {float((there - here).norm() / here.norm()):.2%} "
        "on average), as those of every published DiT do; a student made by `prune --for diffusers` has no such difference"
    )


# ------------------------------------------------------------------------------------------------------------- export


def _model_usage(arch: DiTArch, title: str, guided: bool) -> str:
    null = f"  # null class: {arch.num_classes}" if guided else ""
    return (
        "```python\nfrom diffusers import DiTTransformer2DModel\n\n"
        f'model = DiTTransformer2DModel.from_pretrained("{title}")\n'
        f"noise = model(x, timestep=t, class_labels=y).sample[:, :{arch.in_channels}]{null}\n```"
    )


def _pipeline_usage(arch: DiTArch, title: str, guided: bool) -> str:
    code = (
        f'```python\nfrom diffusers import DiTPipeline\n\npipeline = DiTPipeline.from_pretrained("{title}")\n'
        f"image = pipeline(class_labels=[207], guidance_scale={4.0 if guided else 1}, num_inference_steps=50).images[0]\n```"
    )
    if not guided:
        return code
    return (
        f"{code}\n\n`DiTPipeline` guides all {arch.in_channels} channels and leaves the learned variance unused; published numbers guide "
        f"{min(GUIDED_CHANNELS, arch.in_channels)} and use it."
    )


def _unfit_pipeline(arch: DiTArch, latent_shift: float | None) -> str | None:
    if arch.num_classes != _PIPELINE_NULL_CLASS:
        return (
            f"DiTPipeline guides with class {_PIPELINE_NULL_CLASS}, and its null class is {arch.num_classes} (export without "
            "--pipeline)"
        )
    return None if not latent_shift else f"its latents are shifted by {latent_shift:g}, which DiTPipeline does not undo"


PIPELINE = DiffusersPipeline(
    model_index={
        "_class_name": "DiTPipeline",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", CLASS_NAME],
        "vae": ["diffusers", "AutoencoderKL"],
    },
    # the process that models are trained with, in the words of DDIMScheduler; nothing is clipped, as latents have no range
    scheduler={
        "_class_name": "DDIMScheduler",
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "timestep_spacing": "leading",
        "trained_betas": None,
    },
    unfit=_unfit_pipeline,
    usage=_pipeline_usage,
)
EXPORT = DiffusersExport(
    config_of_arch, lambda tensors, arch: to_diffusers(tensors, arch.depth), _model_usage, PIPELINE
)
