"""Trained weights in bfloat16: updates in float32, written back with stochastic rounding.

bfloat16 has 8 bits of precision, so an update below 1/512 of a weight would be lost by rounding to nearest. Rounded up with the
probability of the remainder, weights follow the float32 update in the mean (Gupta et al., arXiv 1502.02551), and no float32 copy
of them is stored: 2 bytes a weight and 2 a gradient. The random bits are a hash of (seed, step, name, index in the whole tensor),
computed on the device in integers: a resumed run, another number of processes and another device round alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from tinyfusion.config.recipe import TrainingSection
from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Randomness
from tinyfusion.training.shards import first_row, is_sharded, local_part

AT_ONCE = 2**25  # numbers whose float32 copies exist at a time, or those of the largest tensor
_HASHED, _HASHED_CPU = 2**23, 2**17  # numbers whose random bits exist at a time; on a CPU they stay in its cache
_LOW = 0xFFFFFFFF


def hold_weights(model: nn.Module, parameters: Mapping[str, nn.Parameter], settings: TrainingSection) -> None:
    """Cast those of the trained `parameters` that are weights of `model` to `settings.weights`, in place.

    Gates and low-rank factors are few, and stay float32. Call it before an optimiser or average knows the parameters. Raises
    UserError on bfloat16 weights with products of another type, and on sharded ones.
    """
    low = settings.weights == "bfloat16"
    if low and settings.dtype != "bfloat16":
        raise UserError(
            f"weights in bfloat16 are multiplied in bfloat16, and dtype is {settings.dtype}: set dtype to bfloat16 too, or "
            "weights to float32"
        )
    inside = {id(parameter) for parameter in model.parameters()}
    for name, parameter in parameters.items():
        dtype = torch.bfloat16 if low and id(parameter) in inside and ".lora_" not in name else torch.float32
        if low and is_sharded(parameter):
            raise UserError(
                "weights in bfloat16 need whole parameters, and compute.parallel fsdp2 splits them: use ddp"
            )
        if parameter.dtype in (torch.float32, torch.bfloat16, torch.float16) and parameter.dtype != dtype:
            if is_sharded(parameter):
                raise UserError(
                    f"{name} is {parameter.dtype} and sharded; fsdp2 needs trained weights as they are opened: weights float32 "
                    "and a model in float32, or compute.parallel ddp"
                )
            parameter.data = parameter.data.to(dtype)


def as_float32(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values of weights by name, those in bfloat16 as float32, in which models of a family are written."""
    return {name: value.float() if value.dtype == torch.bfloat16 else value for name, value in values.items()}


def random_bits(key: int, first: int, num: int, device: torch.device) -> Tensor:
    """(num,) int32 in 0 .. 2^16 - 1 of the indices from `first`: two rounds of a 32-bit integer hash, keyed by 64 bits.

    Integers wrap, and shifts are made logical by masks, so every device gives the same.
    """
    begin = (first ^ first >> 32) & _LOW  # tensors of more than 2^32 numbers repeat their bits
    value = torch.arange(num, dtype=torch.int32, device=device).add_(_signed(begin))
    for half in (key & _LOW, key >> 32 & _LOW):
        value.add_(_signed(half))
        value.bitwise_xor_((value >> 16).bitwise_and_(0xFFFF)).mul_(0x21F0AAAD)
        value.bitwise_xor_((value >> 15).bitwise_and_(0x1FFFF)).mul_(0x735A2D97)
        value.bitwise_xor_((value >> 15).bitwise_and_(0x1FFFF))
    return value.bitwise_right_shift_(16).bitwise_and_(0xFFFF)


def _signed(number: int) -> int:
    """The 32-bit integer with these bits."""
    return number - 2**32 if number >= 2**31 else number


@torch.no_grad()
def round_into(target: Tensor, exact: Tensor, key: int, first: int = 0) -> None:
    """Write float32 `exact` to bfloat16 `target`: to one of the two neighbours, so that the mean is exact.

    first: index of the first number in the whole tensor, of which these may be some rows.
    """
    flat, result = exact.reshape(-1), torch.empty(exact.numel(), dtype=target.dtype, device=target.device)
    at_once = _HASHED_CPU if flat.device.type == "cpu" else _HASHED
    for begin in range(0, len(flat), at_once):
        some = flat[begin : begin + at_once]
        bits = random_bits(key, first + begin, len(some), some.device)
        bits.add_(some.view(torch.int32)).bitwise_right_shift_(16)  # what is left are bits of a bfloat16
        result[begin : begin + len(some)] = bits.to(torch.int16).view(torch.bfloat16)
        result[begin : begin + len(some)].masked_fill_(some.isnan(), torch.nan)
    target.copy_(result.view(target.shape))


def rounded_step(optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str], seed: int, step: int) -> None:
    """One step of `optimizer`, float32 parameters as usual; bfloat16 ones in float32, and rounded at random.

    names: of the parameters, which address the random numbers. The optimiser sees float32 weights and gradients, a few tensors
    at a time, so its moments are float32 or what it makes of float32.
    """
    groups = optimizer.param_groups
    draws = Randomness(seed).at(step, 0, 1)
    try:
        for group in groups:
            low = [p for p in group["params"] if p.dtype == torch.bfloat16 and p.grad is not None]
            chosen = {id(p) for p in low}
            optimizer.param_groups = [{**group, "params": [p for p in group["params"] if id(p) not in chosen]}]
            optimizer.step()
            for several in _portions(low):
                weights = [_raised(p) for p in several]
                optimizer.param_groups = [{**group, "params": several}]
                try:
                    optimizer.step()
                    exact = [p.data for p in several]
                finally:
                    for p, weight in zip(several, weights, strict=True):
                        p.grad = None
                        p.data = weight
                for p, value in zip(several, exact, strict=True):
                    key = int(draws.words(f"rounding/{names[p]}", 1)[0, 0])
                    row = first_row(p) * (p.shape[1:].numel() if p.ndim else 1)
                    round_into(local_part(p.data), local_part(value), key, row)
    finally:
        optimizer.param_groups = groups


def _raised(parameter: nn.Parameter) -> Tensor:
    """Replace weight and gradient of `parameter` by float32 copies. Returns its weight."""
    weight, gradient = parameter.data, parameter.grad
    assert gradient is not None
    parameter.grad = None
    parameter.data = weight.float()
    parameter.grad = gradient.float()
    return weight


def update_bytes(sizes: Sequence[int]) -> int:
    """The most bytes that `rounded_step` takes, beyond all gradients, for bfloat16 tensors of so many numbers."""
    at_once = min(sum(sizes), max(AT_ONCE, *sizes))
    return 6 * at_once  # float32 weights and gradients, in whose place two bytes of a gradient are gone


def _portions(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Neighbours of together at most `AT_ONCE` numbers, or single larger ones."""
    some: list[nn.Parameter] = []
    numbers = 0
    for parameter in parameters:
        own = local_part(parameter).numel()
        if some and numbers + own > AT_ONCE:
            yield some
            some, numbers = [], 0
        some.append(parameter)
        numbers += own
    if some:
        yield some
