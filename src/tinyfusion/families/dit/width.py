"""The widths of a DiT: its groups of channels, narrower archs, and which formats can hold them.

Groups. *residual*: the stream that all blocks share, with the position table and both sides of the final layer.
*condition*: the sum of timestep and label embedding, read by every modulation and by nothing else. *timestep*: the inner
layer of the timestep embedder. *heads*: per block, channel i of head h in q, k, v and the output projection. *hidden*: per
block, the inner layer of the MLP. The stream and the condition are two groups because no weight ties channel c of
the one to channel c of the other; both keep as many, so the student is a DiT of that width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from tinyfusion.blocks.widths import Axes, Axis, ChannelGroup, WidthRules, num_elements
from tinyfusion.families.dit.model import HEADS_BY_WIDTH, MLP_RATIO, DiT, DiTArch
from tinyfusion.families.sizes import position_table

SHARE_TOLERANCE = 0.02  # how far the number of parameters may lie from the wanted one, as a share of it


def width_groups(arch: DiTArch) -> dict[str, ChannelGroup]:
    """Every group of channels."""
    width, inner = arch.hidden_size, arch.num_heads * arch.head_width
    groups = {name: ChannelGroup(width) for name in ("residual", "condition", "timestep")}
    groups |= {f"heads.blocks.{i}": ChannelGroup(inner, arch.num_heads) for i in range(arch.depth)}
    return groups | {f"hidden.blocks.{i}": ChannelGroup(arch.mlp_width) for i in range(arch.depth)}


def width_axes(arch: DiTArch) -> Axes:
    """Where the groups stand: per tensor, per axis."""
    stream, condition, timestep = Axis("residual"), Axis("condition"), Axis("timestep")
    axes: dict[str, tuple[Axis | None, ...]] = {
        "pos_embed": (None, None, stream),
        "x_embedder.proj.weight": (stream, None, None, None),
        "x_embedder.proj.bias": (stream,),
        "t_embedder.mlp.0.weight": (timestep, None),
        "t_embedder.mlp.0.bias": (timestep,),
        "t_embedder.mlp.2.weight": (condition, timestep),
        "t_embedder.mlp.2.bias": (condition,),
        "y_embedder.embedding_table.weight": (None, condition),
        "final_layer.linear.weight": (None, stream),
        "final_layer.adaLN_modulation.1.weight": (Axis("residual", 2), condition),
        "final_layer.adaLN_modulation.1.bias": (Axis("residual", 2),),
    }
    for i in range(arch.depth):
        heads, hidden = f"heads.blocks.{i}", Axis(f"hidden.blocks.{i}")
        block: dict[str, tuple[Axis | None, ...]] = {
            "attn.qkv.weight": (Axis(heads, 3), stream),
            "attn.qkv.bias": (Axis(heads, 3),),
            "attn.proj.weight": (stream, Axis(heads)),
            "attn.proj.bias": (stream,),
            "mlp.fc1.weight": (hidden, stream),
            "mlp.fc1.bias": (hidden,),
            "mlp.fc2.weight": (stream, hidden),
            "mlp.fc2.bias": (stream,),
            "adaLN_modulation.1.weight": (Axis("residual", 6), condition),
            "adaLN_modulation.1.bias": (Axis("residual", 6),),
        }
        axes |= {f"blocks.{i}.{name}": along for name, along in block.items()}
    return axes


def narrowed_dit(arch: DiTArch, sizes: Mapping[str, int]) -> DiTArch:
    """The arch with these sizes of groups. Raises ValueError where no DiT has them."""
    width, inner, hidden = sizes["residual"], sizes["heads.blocks.0"], sizes["hidden.blocks.0"]
    if inner % arch.num_heads:
        raise ValueError(f"kept_widths heads: {inner} channels cannot be shared out to {arch.num_heads} heads")
    narrow = dataclasses.replace(arch, hidden_size=width, head_dim=inner // arch.num_heads, mlp_hidden=hidden)
    odd = [name for name, group in width_groups(narrow).items() if sizes[name] != group.size]
    if odd:
        wanted = width_groups(narrow)[odd[0]].size
        raise ValueError(f"kept_widths {odd[0]} keeps {sizes[odd[0]]} channels where {wanted} are wanted")
    return narrow


def narrower_dit(arch: DiTArch, share: float) -> DiTArch:
    """The DiT of this depth and these heads whose number of parameters is nearest to `share` of this one's.

    Every width shrinks by the same factor. A published form (heads of width / heads, hidden layer of 4 width) stays one
    where a whole number of channels per head comes within 2 %; else the width is the nearest multiple of 4, heads are
    rounded, and the hidden layer takes up the rest. Raises ValueError where nothing comes within 2 %.
    """
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in DiT(arch).state_dict().items()}
    axes = width_axes(arch)

    def count(narrow: DiTArch) -> int:
        return num_elements(shapes, axes, width_groups(narrow))

    def error(narrow: DiTArch) -> float:
        return abs(count(narrow) - share * count(arch))

    tolerance = SHARE_TOLERANCE * share * count(arch)
    if arch.head_dim is None and arch.mlp_hidden is None:
        step = math.lcm(4, arch.num_heads)
        same_form = [dataclasses.replace(arch, hidden_size=w) for w in range(step, arch.hidden_size + 1, step)]
        nearest = min(same_form, key=error)
        if error(nearest) <= tolerance:
            return nearest

    def filled(width: int) -> tuple[float, DiTArch]:
        """How far the proportional arch of this width is off, and that arch with hidden layers that make up for it."""
        factor = width / arch.hidden_size
        heads, hidden = (max(1, round(size * factor)) for size in (arch.head_width, arch.mlp_width))
        even = dataclasses.replace(arch, hidden_size=width, head_dim=heads, mlp_hidden=hidden)
        per_channel = count(dataclasses.replace(even, mlp_hidden=hidden + 1)) - count(even)
        wanted = hidden + round((share * count(arch) - count(even)) / per_channel)
        return error(even), dataclasses.replace(even, mlp_hidden=min(max(wanted, 1), arch.mlp_width))

    proportional = [filled(width) for width in range(4, arch.hidden_size + 1, 4)]
    fitting = [(off, narrow) for off, narrow in proportional if error(narrow) <= tolerance]
    if not fitting:
        nearest = min((narrow for _, narrow in proportional), key=error)
        raise ValueError(
            f"no width of this model has {share:.3g} of its parameters; the nearest is {count(nearest) / count(arch):.3g}"
        )
    return min(fitting, key=lambda pair: pair[0])[1]


def keep_logit_scale(tensors: dict[str, Tensor], old: DiTArch, new: DiTArch) -> None:
    """Scale q of sliced `tensors`, in place, so that attention logits stay q.k / sqrt(d) of the old head width d.

    A DiT divides by the root of its own head width; its q therefore carries sqrt(new / old).
    """
    if old.head_width == new.head_width:
        return
    inner = new.num_heads * new.head_width
    for i in range(new.depth):
        for name in ("weight", "bias"):
            tensors[f"blocks.{i}.attn.qkv.{name}"][:inner] *= math.sqrt(new.head_width / old.head_width)


def is_rounded(table: Tensor, formula: Tensor) -> bool:
    """Whether a table holds the values of a formula, or those rounded to half precision, as files in half precision store them."""
    kinds = (table.dtype, torch.float16, torch.bfloat16)
    return table.shape == formula.shape and any(torch.equal(table, formula.to(kind).to(table.dtype)) for kind in kinds)


def unfit_formats(arch: DiTArch, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Formats of others that cannot hold a DiT of these sizes, with the reason.

    official: the state dict of the published code, whose readers know widths and heads from a table. diffusers: a folder
    for `DiTTransformer2DModel`, which holds heads and sizes but computes the position table.
    """
    reasons: list[str] = []
    if arch.head_dim is not None:
        inner = arch.num_heads * arch.head_dim
        reasons.append(
            f"its attention is {inner} channels wide and its stream {arch.hidden_size}; the format has one width"
        )
    if arch.mlp_hidden is not None:
        reasons.append(
            f"its hidden layers have {arch.mlp_hidden} channels; the format has {MLP_RATIO} x {arch.hidden_size}"
        )
    table = position_table(arch.hidden_size, arch.input_size // arch.patch_size)
    official, diffusers = list(reasons), list(reasons)
    if HEADS_BY_WIDTH.get(arch.hidden_size, arch.num_heads) != arch.num_heads:
        published = HEADS_BY_WIDTH[arch.hidden_size]
        official.append(
            f"it has {arch.num_heads} heads, which the file does not say, and readers take {published} at width {arch.hidden_size}"
        )
    if not is_rounded(tensors["pos_embed"].detach().cpu(), table):
        diffusers.append("its position table is not the formula's, and the format does not store one")
    if not arch.null_class:
        diffusers.append("it has no null class, for which its class always has a row in the label table")
    reasons_by_format = {"official": official, "diffusers": diffusers}
    return {name: "; ".join(why) for name, why in reasons_by_format.items() if why}


DIT_WIDTHS = WidthRules(width_groups, width_axes, narrowed_dit, narrower_dit, keep_logit_scale)
