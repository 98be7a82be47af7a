"""Learning rates by parameter group on the command line; the groups are :mod:`vwn.nn.groups`."""

from __future__ import annotations

from vwn.common.errors import UserError
from vwn.nn.groups import GROUPS, check_factors


def parse_factors(items: tuple[str, ...]) -> dict[str, float]:
    """``("routing=0.3", ...)`` to ``{"routing": 0.3, ...}``.

    Raises:
        UserError: an unknown group, a factor that is no number above 0, or a group named twice.
    """
    factors: dict[str, float] = {}
    for item in items:
        group, _, text = item.partition("=")
        try:
            factor = check_factors({group: float(text)})[group]
        except ValueError:
            raise UserError(
                f"--rate-factors takes GROUP=FACTOR, such as routing=0.3, with a group out of {', '.join(GROUPS)} "
                f"and a factor above 0; got {item!r}"
            ) from None
        if group in factors:
            raise UserError(f"--rate-factors names {group} twice")
        factors[group] = factor
    return factors
