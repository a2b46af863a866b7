"""The live view as lines of text, for any width and height."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.text import Text

from finetune.cli.live.figures import Figures
from finetune.cli.live.sparkline import BLOCKS, PLAIN, Trace, sparkline
from finetune.data.shown import shown

_LABEL = 12
_LEAST_CURVE = 8
_WIDEST_CURVE = 100
_MOST_RATE_LINES = 3
_BAR = ("━", "─")
_PLAIN_BAR = ("#", "-")


@dataclass(frozen=True, slots=True)
class Look:
    """What does not change while a run lasts."""

    epochs: int
    blocks: bool = True
    """Whether the terminal's encoding has block characters."""
    planned_speed: float | None = None
    """Tokens a second that the plan counted with."""
    validates: bool = True


def panel(figures: Figures, look: Look, width: int, height: int) -> list[Text]:
    """At most ``height`` lines of at most ``width`` columns; where there is no room for all, the least important are left out."""
    rows = [
        (0, _head(figures, look)),
        (8, [_bar(figures, look, width)]),
        (1, _curve("loss", _number(figures.loss), figures.losses, look, width)),
        (2, _validation(figures, look, width)),
        (7, _curve("gradient", _gradient(figures), figures.norms, look, width)),
        (5, _rates(figures.rates, width)),
        (3, [_labelled("speed", _speed(figures, look))]),
        (4, [_labelled("memory", _memory(figures))]),
        (6, _sample(figures, width)),
    ]
    room, kept = height, set()
    for rank, lines in sorted(rows, key=lambda row: row[0]):
        if len(lines) <= room:
            kept.add(rank)
            room -= len(lines)
    chosen = [line for rank, lines in rows if rank in kept for line in lines]
    for line in chosen:
        line.truncate(width, overflow="ellipsis" if look.blocks else "crop")
    return chosen


def _labelled(label: str, text: str) -> Text:
    return Text(f"{label:<{_LABEL}}", style="dim", no_wrap=True) + Text(text, style="not dim")


def _head(figures: Figures, look: Look) -> list[Text]:
    share = figures.step / figures.total if figures.total else 1.0
    left = "" if figures.left is None else f"{duration(figures.left)} left, "
    rest = f"  {share:.0%}  {left}{duration(figures.elapsed)} gone  epoch {figures.epoch:.2f} of {look.epochs}"
    return [Text(f"step {figures.step}/{figures.total}", style="bold") + Text(rest, style="not bold")]


def _bar(figures: Figures, look: Look, width: int) -> Text:
    done, open_ = _BAR if look.blocks else _PLAIN_BAR
    filled = round(figures.step / figures.total * width) if figures.total else width
    return Text(done * filled, style="green") + Text(open_ * (width - filled), style="dim")


def _curve(label: str, value: str, trace: Trace, look: Look, width: int) -> list[Text]:
    line = _labelled(label, f"{value:<9}")
    room = min(width - line.cell_len - 1, _WIDEST_CURVE)
    if room >= _LEAST_CURVE:
        line.append(" " + sparkline(trace.points(room), BLOCKS if look.blocks else PLAIN), style="cyan")
    line.rstrip()
    return [line]


def _validation(figures: Figures, look: Look, width: int) -> list[Text]:
    if not look.validates:
        return []
    if figures.best is None:
        return [_labelled("validation", "not measured yet")]
    loss, step = figures.best
    value = f"{_number(figures.validation)}  best {loss:.4f} at step {step} "
    return _curve("validation", value, figures.validations, look, width)


def _gradient(figures: Figures) -> str:
    text = "-" if figures.norm is None else f"{figures.norm:.3g}"
    if figures.max_norm is None or not figures.counted:
        return text
    return f"{text}  {figures.clipped / figures.counted:.0%} clipped at {figures.max_norm:g} "


def _rates(rates: Mapping[str, float], width: int) -> list[Text]:
    """Groups that share a rate share a word; a line that would be too long goes on in the next."""
    lines: list[str] = []
    for text in rate_texts(rates) or ["-"]:
        if lines and len(lines[-1]) + 2 + len(text) <= width - _LABEL:
            lines[-1] += f", {text}"
        else:
            lines.append(text)
    if len(lines) > _MOST_RATE_LINES:
        lines = [*lines[: _MOST_RATE_LINES - 1], "and more"]
    return [_labelled("rate" if not number else "", line) for number, line in enumerate(lines)]


def rate_texts(rates: Mapping[str, float]) -> list[str]:
    """Each rate with the groups that it is for; alone where all have the same."""
    found: dict[str, list[str]] = {}
    for name, rate in rates.items():
        found.setdefault(f"{rate:.2e}", []).append(shown(name))
    if len(found) == 1:
        return list(found)
    return [f"{' + '.join(names)} {rate}" for rate, names in found.items()]


def _speed(figures: Figures, look: Look) -> str:
    if figures.speed is None or figures.waiting is None:
        return "-"
    against = f" ({figures.speed / look.planned_speed:.0%} of the {look.planned_speed:,.0f} planned)" if look.planned_speed else ""
    return f"{figures.speed:,.0f} tok/s{against}, reading rows {figures.waiting:.0%}"


def _memory(figures: Figures) -> str:
    if not figures.memory_bytes:
        return "-"
    of = f" of {gib(figures.device_bytes)} ({figures.memory_bytes / figures.device_bytes:.0%})" if figures.device_bytes else ""
    return f"{gib(figures.memory_bytes)} at most{of}"


def _sample(figures: Figures, width: int) -> list[Text]:
    """Prompt and answer, one line each: text from strangers, of which the terminal obeys nothing."""
    if figures.sample is None:
        return []
    step, prompt, text = figures.sample
    return [_labelled(f"sample {step}", ending(prompt, width - _LABEL - 1)), _labelled("", f"-> {beginning(text, width)}")]


def ending(text: str, most: int) -> str:
    """At most about ``most`` characters of ``text`` as a terminal may be given them, on one line: its end, where a prompt asks."""
    words = " ".join(text.split())
    return shown(words if len(words) <= most else f"...{words[-max(0, most - 3) :]}")


def beginning(text: str, most: int) -> str:
    """The same of its beginning, where an answer answers."""
    words = " ".join(text.split()) or "(nothing)"
    return shown(words if len(words) <= most else f"{words[: max(0, most - 3)]}...")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def gib(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB" if count < 100 * 2**30 else f"{count / 2**30:.0f} GiB"


def duration(seconds: float) -> str:
    """``75`` -> ``1:15``, ``3700`` -> ``1:01:40``, ``100000`` -> ``1 d 3:46:40``."""
    whole = max(0, round(seconds))
    days, rest = divmod(whole, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, rest = divmod(rest, 60)
    clock = f"{hours}:{minutes:02}:{rest:02}" if whole >= 3600 else f"{minutes}:{rest:02}"
    return f"{days} d {clock}" if days else clock


def plain_line(row: Mapping[str, Any], figures: Figures) -> str:
    """One step for a pipe or a log."""
    parts = (
        f"step {row['step']}/{figures.total}",
        f"loss {row['loss']:.4f}",
        f"grad norm {row['grad_norm']:.3f}",
        f"lr {', '.join(rate_texts(figures.rates))}",
        f"{figures.speed or 0:.0f} tok/s",
        gib(figures.memory_bytes),
        *(() if figures.left is None else (f"{duration(figures.left)} left",)),
    )
    return "  ".join(parts)
