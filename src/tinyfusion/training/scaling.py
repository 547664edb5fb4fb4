"""Loss scaling for float16: small gradients are lifted above what float16 rounds to 0, and brought back before the update."""

from __future__ import annotations

_START, _FLOOR, _GROW_EVERY = 2.0**16, 1.0, 2000


class LossScale:
    """Halved after a step that overflowed, doubled after 2000 that did not; as torch's GradScaler by default.

    Not that class, because it looks at the gradients of one process, and ours may be sharded over
    several. Without `used` there is no scale, and `value` is None.
    """

    def __init__(self, used: bool) -> None:
        self.value: float | None = _START if used else None
        self.good_steps = 0

    @property
    def can_fall(self) -> bool:
        """Whether an overflow may still be the scale's fault."""
        return self.value is not None and self.value > _FLOOR

    def update(self, finite: bool) -> None:
        """Take in whether the gradients of a step were finite."""
        if self.value is None:
            return
        if not finite:
            self.value, self.good_steps = max(self.value / 2, _FLOOR), 0
            return
        self.good_steps += 1
        if self.good_steps == _GROW_EVERY:
            self.value, self.good_steps = self.value * 2, 0
