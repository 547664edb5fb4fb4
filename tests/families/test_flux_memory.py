"""The memory plan of a small FLUX against the bytes of live tensors in a step, by the records of torch's allocator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest

from flux_step import DENSE, RECOVERIES, SKIP, Side, Sizes, flux, learning, recovering, rows_of

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers, about itself
SIZES = Sizes(batch=2, tokens=128, texts=64)
MAKE = partial(flux, double=2, single=4, heads=1)  # of width 128


@pytest.mark.parametrize(
    ("make", "names"),
    [
        pytest.param(partial(learning, MAKE, SIZES), [DENSE, SKIP], id="gates"),
        *(pytest.param(partial(recovering, MAKE, name, SIZES), [name], id=name) for name in RECOVERIES),
    ],
)
def test_the_plan_is_what_a_step_takes(make: Callable[[], Sequence[Side]], names: Sequence[str]) -> None:
    rows = {row.name: row for row in rows_of(make, repeats=1)}
    assert list(rows) == names
    for row in rows.values():
        assert row.measured > row.peak > 0
        assert row.plan == pytest.approx(row.measured, rel=0.2), f"{row.name}: {row.ratio:.3f}"
    if DENSE in rows:
        assert rows[SKIP].peak < 0.75 * rows[DENSE].peak
