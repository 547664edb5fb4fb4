"""Find the state dict of a network in the content of a file: nested, wrapped and prefixed as training code saves it.

Every mapping of tensors in the content is searched, at any depth. A network is recognised by its mark, the name of one of its
tensors; the text before the mark is the prefix of the whole network. So no layout of checkpoints is hard-coded.
"""

from __future__ import annotations

import re
import sys
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tinyfusion.core.errors import UserError
from tinyfusion.core.tensors import check_shared, flat_tensors

_DEPTH = 8  # of nested mappings that are searched
_MAPPINGS = 100_000  # that are searched; an optimiser has one per parameter
# names that compilers and distributed wrappers insert anywhere in a name
_WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module|module)\."
)
_AVERAGED = re.compile(r"ema|shadow|averag", re.IGNORECASE)
# kinds of files that are not supported models, and advice
OTHER_KINDS = {
    "lora": "is a LoRA, which changes a model and is none: merge it into its model first, as `merge_and_unload` of peft and "
    "`fuse_lora` of diffusers do, and give the merged model",
    "lightningdit": "is a LightningDiT (RMSNorm, SwiGLU, rotary positions), whose blocks are of no family here: it cannot be opened",
    "repa": "was trained with REPA: remove its tensors projectors.*, which serve training alone, and save it anew",
    "mdt": "is an MDT, whose blocks are of no family here: it cannot be opened",
    "mmdit": "is a transformer of text and image streams (FLUX, SD3) in one file: give its folder of diffusers, with the config.json",
    "diffusers": "has the names of diffusers: put it as diffusion_pytorch_model{suffix} into a folder with the config.json of its "
    "model, and give the folder",
    "unet": "is a U-Net, and models here are transformers: it cannot be opened",
    "autoencoder": "is an autoencoder: give it as --vae, and here the model of its latents",
}
# the tensor names by which they are recognised; the first match counts
_KNOWN_BY = {
    "lora": r"lora_(A|B|down|up|embedding_[AB])\b|\.lora\.(down|up)\.|_lora\.(down|up)\.",
    "lightningdit": r"\.mlp\.w12\.|(^|\.)feat_rope\.",
    "repa": r"(^|\.)projectors\.\d",
    "mdt": r"(^|\.)((en|de)_(in|out)?blocks|side_?interpolater|sideblocks)\.",
    "mmdit": r"(^|\.)(double_blocks|joint_blocks|single_transformer_blocks)\.",
    "diffusers": r"(^|\.)(transformer_blocks\.\d+|adaln_single)\.",
    "unet": r"(^|\.)(down_blocks|input_blocks)\.\d",
    "autoencoder": r"(^|\.)((encoder|decoder)\.(down|up|down_blocks|up_blocks|conv_in)|post_quant_conv)\b",
}


@dataclass(frozen=True)
class StateDict:
    """The tensors of a network by its own names; keys: of the mappings around it; prefix: removed from its names.

    others: tensors of the same mapping outside of the prefix. odd: a key inside without a tensor.
    """

    tensors: dict[str, Tensor]
    keys: tuple[str, ...] = ()
    prefix: str = ""
    others: int = 0
    odd: str | None = None

    @property
    def label(self) -> str:
        """Its position in the file, for messages."""
        return " / ".join([*self.keys, *([f"{self.prefix}*"] if self.prefix else [])]) or "the file itself"

    @property
    def averaged(self) -> bool:
        """Whether its position names averages of weights."""
        return any(_AVERAGED.search(part) for part in (*self.keys, self.prefix))


def find_state_dict(
    content: Any, marks: Collection[str], weights: str, path: Path, untrained: Collection[str] = ()
) -> StateDict:
    """The state dict of a network with one of `marks` in the content of a file; the choice is reported on stderr.

    weights: "ema" or "raw", if there are both. untrained: names that a list of averages may lack. Without a mark the largest
    mapping of tensors is returned, so that the caller reports what is missing. Raises UserError if there is none, and on files
    that are recognised as something else.
    """
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state dict")
    mappings = list(_mappings(content))
    named = [state for keys, mapping in mappings for state in _named(keys, mapping, marks, path)]
    states = [*named, *(s for keys, mapping in mappings for s in _listed(keys, mapping, named, untrained))]
    if not states:
        return _unmarked(content, mappings, path)
    ordered = sorted(states, key=lambda state: state.averaged is not (weights == "ema"))
    chosen = ordered[0]
    if chosen.odd is not None:
        raise UserError(f"{path} is no state dict of tensors (it holds {chosen.odd!r})")
    check_shared(chosen.tensors, path)
    _say(chosen, ordered, mappings, weights, path)
    return chosen


def _mappings(content: Mapping[Any, Any]) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    """Every mapping in the content with its keys, breadth first, each once."""
    seen = {id(content)}
    queue: deque[tuple[tuple[str, ...], Mapping[Any, Any]]] = deque([((), content)])
    while queue and len(seen) < _MAPPINGS:
        keys, mapping = queue.popleft()
        yield keys, mapping
        for key, value in mapping.items() if len(keys) < _DEPTH else ():
            if isinstance(value, Mapping) and id(value) not in seen:
                seen.add(id(value))
                queue.append(((*keys, str(key)), value))


def _named(
    keys: tuple[str, ...], mapping: Mapping[Any, Any], marks: Collection[str], path: Path
) -> Iterator[StateDict]:
    names = {str(key): _WRAPPERS.sub("", str(key)) for key in mapping}
    tensor_names = [names[str(key)] for key, value in mapping.items() if isinstance(value, Tensor)]
    places = [(name, mark) for name in tensor_names for mark in marks if f".{name}".endswith(f".{mark}")]
    for prefix in dict.fromkeys(name.removesuffix(mark) for name, mark in places):
        tensors, odd, others = dict[str, Tensor](), None, 0
        for key, value in mapping.items():
            name = names[str(key)]
            if not name.startswith(prefix):
                others += isinstance(value, Tensor)
            elif not isinstance(value, Tensor):
                odd = odd or str(key)
            elif name.removeprefix(prefix) in tensors:
                raise UserError(f"{path} holds {name} twice, with and without the names that wrappers add")
            else:
                tensors[name.removeprefix(prefix)] = value
        yield StateDict(tensors, keys, prefix, others, odd)


def _listed(
    keys: tuple[str, ...], mapping: Mapping[Any, Any], named: Sequence[StateDict], untrained: Collection[str]
) -> Iterator[StateDict]:
    """Averages in lists of tensors, named after a state dict whose parameters they match in order and shape."""
    for key, listed in mapping.items():
        if not isinstance(listed, list | tuple) or not listed or not all(isinstance(value, Tensor) for value in listed):
            continue
        for like in named[:1]:
            for names in (list(like.tensors), [name for name in like.tensors if name not in untrained]):
                if [like.tensors[name].shape for name in names] == [value.shape for value in listed]:
                    yield StateDict({**like.tensors, **dict(zip(names, listed, strict=True))}, (*keys, str(key)))
                    break


def _unmarked(
    content: Mapping[Any, Any], mappings: Sequence[tuple[tuple[str, ...], Mapping[Any, Any]]], path: Path
) -> StateDict:
    """The mapping with most tensors, where it holds nothing else."""
    counted = [(sum(isinstance(v, Tensor) for v in mapping.values()), keys, mapping) for keys, mapping in mappings]
    number, keys, mapping = max(counted, key=lambda entry: entry[0])
    if what := described_other((_WRAPPERS.sub("", str(key)) for key in mapping), path.suffix):
        raise UserError(f"{path} {what}")
    return StateDict(flat_tensors(mapping if number else content, path), keys)


def described_other(names: Iterable[str], suffix: str = ".safetensors") -> str | None:
    """Kind and advice for a file with tensors of these names, if it is recognised as not supported; else None."""
    listed = list(names)
    for kind, pattern in _KNOWN_BY.items():
        if any(re.search(pattern, name) for name in listed):
            return OTHER_KINDS[kind].replace("{suffix}", suffix if suffix == ".safetensors" else ".bin")
    return None


def _say(
    chosen: StateDict,
    ordered: Sequence[StateDict],
    mappings: Sequence[tuple[tuple[str, ...], Mapping[Any, Any]]],
    weights: str,
    path: Path,
) -> None:
    """Report on stderr which of several state dicts was taken, and the tensors that were not."""
    other = next((state for state in ordered if state.averaged is not chosen.averaged), None)
    same = [state.label for state in ordered[1:] if state.averaged is chosen.averaged]
    if other is not None:
        weights_option = "raw" if chosen.averaged else "ema"
        print(f"{path}: taking {chosen.label}; --weights {weights_option} takes {other.label}", file=sys.stderr)
    elif weights == "ema" and any(_AVERAGED.search(key) for keys, _ in mappings for key in keys):
        print(f"{path}: taking {chosen.label}, as its averaged weights have no names of this model", file=sys.stderr)
    if same:
        print(f"{path}: {', '.join(same)} fits too; save it to a file of its own to open it", file=sys.stderr)
    if chosen.others:
        print(f"{path}: leaving {chosen.others} tensors that do not begin with {chosen.prefix}", file=sys.stderr)
