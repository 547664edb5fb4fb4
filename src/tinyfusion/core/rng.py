"""Addressed random numbers: every draw is a pure function of (seed, purpose, step, global sample index).

A counter-based generator (Philox 4x64, Salmon et al. 2011) is keyed by (seed, purpose), its counter is (step, index). So a
resumed run, another batch size, accumulation or number of processes gives the same numbers bit for bit. Normals come from the
inverse distribution function, one uniform each, because rejection methods consume an unknown number of draws.

Shapes: B rows, one per global sample index. Values are NumPy arrays.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri

_WORDS_PER_COUNTER = 4  # Philox 4x64 gives four 64-bit words for every counter value.


@dataclass(frozen=True)
class Randomness:
    """The random numbers of a job. seed: a non-negative integer below 2**64."""

    seed: int

    def at(self, step: int, first: int, num: int) -> Draws:
        """The draws of samples `first .. first + num - 1` at `step`."""
        return Draws(self.seed, step, first, num)

    def permutation(self, purpose: str, step: int, num: int) -> np.ndarray:
        """A random order of `num` items, the same for every process."""
        return np.argsort(self.at(step, 0, 1).words(purpose, num)[0], kind="stable")

    def generator_seed(self, purpose: str) -> int:
        """A 63-bit seed for a generator of another library, used where values are drawn once (initial weights)."""
        return int(self.at(0, 0, 1).words(purpose, 1)[0, 0] >> np.uint64(1))


@dataclass(frozen=True)
class Draws:
    """The draws of `num` consecutive global samples at one step; row i belongs to sample `first + i`."""

    seed: int
    step: int
    first: int
    num: int

    def _bits(self, purpose: str, counters: int) -> np.random.Philox:
        """The generator at the first sample's address; every sample has `counters` counter values of four words."""
        digest = hashlib.sha256(purpose.encode()).digest()
        key = np.array([self.seed, int.from_bytes(digest[:8], "little")], dtype=np.uint64)
        return np.random.Philox(key=key, counter=np.array([self.first * counters, 0, self.step, 0], dtype=np.uint64))

    def words(self, purpose: str, per_sample: int) -> np.ndarray:
        """(B, per_sample) uint64, every bit random."""
        return self.words_in_turn(purpose, per_sample)(self.num)

    def words_in_turn(self, purpose: str, per_sample: int) -> Callable[[int], np.ndarray]:
        """The rows of `words` in calls: each gives the next `num` samples, (num, per_sample) uint64."""
        counters = -(-per_sample // _WORDS_PER_COUNTER)
        bits = self._bits(purpose, counters)

        def following(num: int) -> np.ndarray:
            raw = bits.random_raw(num * counters * _WORDS_PER_COUNTER)
            return raw.reshape(num, counters * _WORDS_PER_COUNTER)[:, :per_sample]

        return following

    def uniform(self, purpose: str, shape: tuple[int, ...] = ()) -> np.ndarray:
        """(B, *shape) float64, uniform in (0, 1): the upper 53 bits of each of `words`, offset by half a unit."""
        per_sample = int(np.prod(shape, dtype=np.int64))
        counters = -(-per_sample // _WORDS_PER_COUNTER)
        generator = np.random.Generator(self._bits(purpose, counters))
        values = generator.random(self.num * counters * _WORDS_PER_COUNTER)
        values += 2.0**-54
        return values.reshape(self.num, counters * _WORDS_PER_COUNTER)[:, :per_sample].reshape(self.num, *shape)

    def normal(self, purpose: str, shape: tuple[int, ...] = ()) -> np.ndarray:
        """(B, *shape) float32, standard normal."""
        values = self.uniform(purpose, shape)
        return ndtri(values, out=values).astype(np.float32)

    def gumbel(self, purpose: str, shape: tuple[int, ...] = ()) -> np.ndarray:
        """(B, *shape) float32, standard Gumbel: -log(E) with E ~ Exp(1)."""
        return (-np.log(-np.log(self.uniform(purpose, shape)))).astype(np.float32)

    def integers(self, purpose: str, high: int, shape: tuple[int, ...] = ()) -> np.ndarray:
        """(B, *shape) int64, uniform in 0 .. high - 1 (`high` at most 2**32: the bias is below 2**-21)."""
        return np.minimum((self.uniform(purpose, shape) * high).astype(np.int64), high - 1)


@dataclass(frozen=True)
class StratifiedDraws(Draws):
    """Draws whose "timestep" is stratified: each is in one of `parts` equal intervals of (0, 1), by its global sample index i.

    The interval is i mod `parts`, or if `shuffled` the same through a random order. Integers, uniforms and normals of the
    purpose "timestep" are stratified alike.
    """

    parts: int = 1
    shuffled: bool = False

    def uniform(self, purpose: str, shape: tuple[int, ...] = ()) -> np.ndarray:
        """As in `Draws`, stratified for the purpose "timestep"."""
        values = super().uniform(purpose, shape)
        if purpose != "timestep":
            return values
        part = np.arange(self.first, self.first + self.num) % self.parts
        if self.shuffled:
            part = Randomness(self.seed).permutation("timestep/strata", self.step, self.parts)[part]
        return (part.reshape(-1, *[1] * len(shape)) + values) / self.parts
