"""Numbers as a report words them."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from typing import Any

NOTHING = "–"


def number(value: float | None, digits: int = 3) -> str:
    """``digits`` significant ones, whole numbers whole and with separators; a dash for what is not known."""
    if value is None or not math.isfinite(value):
        return NOTHING
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{value:,.0f}"
    shown = f"{value:.{digits}g}"
    return f"{float(shown):,.0f}" if abs(value) >= 10**digits else shown


def places_that_tell(low: float, high: float, least: int = 3) -> int:
    """Decimals, ``least`` or more, at which an interval without zero is seen to leave it out."""
    near, places = min(abs(low), abs(high)), least
    while low * high > 0 and round(near, places) == 0:
        places += 1
    return places


def figure(value: float | str) -> str:
    """A figure of a finding: text as it is, numbers with four significant digits."""
    return value if isinstance(value, str) else number(value, 4)


def gibibytes(count: float | None) -> str:
    """Bytes as GiB, or as MiB below one."""
    if count is None:
        return NOTHING
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def duration(seconds: float | None) -> str:
    """Seconds in the two largest units."""
    if seconds is None:
        return NOTHING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def moment(stored: str | None) -> str:
    """A time as environment.json keeps it, to the minute."""
    if stored is None:
        return NOTHING
    try:
        return f"{datetime.fromisoformat(stored).astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    except ValueError:
        return stored


def percent(share: float | None) -> str:
    """A share between 0 and 1."""
    if share is None:
        return NOTHING
    return f"{share:.1%}" if share >= 0.001 or share <= 0 else f"{100 * share:.1g}%"


def setting(value: Any) -> str:
    """A value of a configuration as it could be written in one."""
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
