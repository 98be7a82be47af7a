"""The sizes of virtual width: one frozen dataclass, the only home of everything derived from ``(D, m, n)``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Geometry:
    """Backbone width ``D``, fraction rate ``m`` and number of slots ``n`` (section 3.1 of the paper).

    Args:
        hidden_size: ``D``, the width of the backbone.
        m: fraction rate; ``D`` is cut into ``m`` segments.
        n: number of slots of the over-width state, ``n >= m``.

    Raises:
        ValueError: ``m`` does not divide ``D``, or ``n < m``, or a size is not a positive integer.
    """

    hidden_size: int
    m: int
    n: int

    def __post_init__(self) -> None:
        for name in ("hidden_size", "m", "n"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.hidden_size % self.m:
            divisors = [k for k in range(1, self.hidden_size + 1) if self.hidden_size % k == 0]
            nearest = min(divisors, key=lambda k: (abs(k - self.m), k))
            raise ValueError(
                f"m = {self.m} does not divide the hidden size {self.hidden_size}; the nearest m that does is {nearest}"
            )
        if self.n < self.m:
            raise ValueError(
                f"n = {self.n} slots are fewer than m = {self.m} segments; n must be at least m (nearest: n = {self.m})"
            )

    @property
    def segment_size(self) -> int:
        """``d = D / m``, the width of a segment and of a slot."""
        return self.hidden_size // self.m

    @property
    def over_width(self) -> int:
        """``D' = r D = n d``, the width of the over-width state."""
        return self.n * self.segment_size

    @property
    def ratio(self) -> float:
        """``r = n / m``, the virtual width factor; may be fractional."""
        return self.n / self.m

    @property
    def is_whole(self) -> bool:
        """True if ``r`` is an integer, so that the state splits into groups of ``D``."""
        return self.n % self.m == 0
