"""A tokenizer's chat template, compiled by us: rendered once for a conversation, it also says where each message begins.

The template is parsed by Jinja, and a call is put at the start of every loop body. The output is read piece by piece as it is made, so when
the loop comes to a message, the characters written so far are that message's place. Nothing is inserted into the text, and the cost grows
with the conversation, not with its square. The same calls keep the budget (`finetune.data.sandbox`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jinja2 import Template, TemplateError

from finetune.data.instrument import instrument
from finetune.data.meter import OverBudgetError
from finetune.data.sandbox import Sandbox
from finetune.data.shown import shown
from finetune.errors import DataError

# What an expression of a template can raise beside Jinja's own errors: `{{ 1 + 'a' }}`, `{{ '%q' % 1 }}`, `{{ 1 / 0 }}`, ...
_FAULTS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError, MemoryError)

_LONGEST_SOURCE = 262_144  # characters; the longest templates of well-known models have about 20,000
_BASE_BUDGET = 1_000_000  # units of `Meter.charge`; a turn of a loop in a large template costs about 1,000
_BUDGET_PER_CHARACTER = 100  # of the conversation: templates that compare every message with every other are quadratic
_LONGEST_MESSAGE = 200  # characters of what a template says when it refuses
_LONGEST_FACTOR = 20  # characters of output for each of input, beside _BASE_BUDGET


class Rendered(NamedTuple):
    """A conversation as text."""

    text: str
    regions: tuple[tuple[int, int], ...] | None
    """Characters of each message with its header, up to the next; None where the template does not go through the messages in order."""


class ChatTemplate:
    """Compiled source; DataError where it cannot be compiled. Renders one conversation at a time (no threads)."""

    def __init__(self, source: str, variables: Mapping[str, Any]) -> None:
        self._sandbox = Sandbox()
        self._template = self._compile(source)
        self._variables = {**self._sandbox.globals, **variables, "documents": None}

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = (), *, ask: bool, where: str) -> Rendered:
        """The text, asking for the next assistant turn if ``ask``; DataError where the template refuses, fails or does not end."""
        meter = self._sandbox.meter
        size = sum(map(_characters, messages)) + sum(map(_characters, tools))
        meter.start(_BASE_BUDGET + _BUDGET_PER_CHARACTER * size, messages)
        try:
            text = self._write(messages, list(tools) or None, ask, _BASE_BUDGET + _LONGEST_FACTOR * size)
        except (TemplateError, *_FAULTS) as error:
            raise _refusal(error, where) from error
        starts = _starts(meter.seen, len(messages))
        return Rendered(text, None if starts is None else tuple(zip(starts, (*starts[1:], len(text)), strict=True)))

    def _write(self, messages: Sequence[Mapping[str, Any]], tools: list[Mapping[str, Any]] | None, ask: bool, longest: int) -> str:
        given = {**self._variables, "messages": list(messages), "tools": tools, "add_generation_prompt": ask}
        meter, pieces = self._sandbox.meter, []
        for piece in self._template.root_render_func(self._template.new_context(given, shared=True)):
            pieces.append(piece)
            meter.written += len(piece)
            if meter.written > longest:
                raise OverBudgetError(f"it writes more than {longest} characters")
        return "".join(pieces)

    def _compile(self, source: str) -> Template:
        if len(source) > _LONGEST_SOURCE:
            raise DataError(
                f"the chat template has {len(source)} characters; no more than {_LONGEST_SOURCE} are read",
                where="chat template",
                fix="use the template that came with the model",
            )
        self._sandbox.meter.start(_BASE_BUDGET)  # Jinja computes constants while it compiles
        try:
            tree = self._sandbox.parse(source)
            instrument(self._sandbox, tree)
            return Template.from_code(self._sandbox, self._sandbox.compile(tree), {})
        except (TemplateError, SyntaxError, *_FAULTS) as error:
            raise DataError(
                f"the chat template cannot be compiled: {type(error).__name__}: {shown(str(error), _LONGEST_MESSAGE)}",
                where=f"chat template, line {getattr(error, 'lineno', None) or '?'}",
                fix="mend the tokenizer's chat template",
            ) from error


def _refusal(error: BaseException, where: str) -> DataError:
    said = shown(str(error), _LONGEST_MESSAGE)
    if isinstance(error, OverBudgetError):
        what = f"the chat template was stopped: {said}"
        return DataError(what, where=where, fix="use the template that came with the model; if this is it, shorten the row")
    if isinstance(error, TemplateError):
        return DataError(f"the chat template refuses this conversation: {said}", where=where, fix="check the order of roles")
    return DataError(
        f"the chat template fails on this conversation: {type(error).__name__}: {said}",
        where=where,
        fix="check the order of roles, or mend the tokenizer's chat template",
    )


def _characters(value: object) -> int:
    """About how much there is to write of ``value``: a message, most often."""
    if isinstance(value, str):
        return len(value) + 8
    if isinstance(value, dict):
        return 16 + sum([len(item) if type(item) is str else _characters(item) for item in value.values()])
    return 8 + sum(map(_characters, value)) if isinstance(value, (list, tuple)) else 8


def _starts(seen: Sequence[tuple[int, int, int]], count: int) -> tuple[int, ...] | None:
    """From (loop, message, characters before it): the start of each message, by the loop that wrote most.

    Messages that come before those of the loop (a system message, written on its own) begin at 0.
    """
    loops: dict[int, list[tuple[int, int]]] = {}
    for loop, number, written in seen:
        loops.setdefault(loop, []).append((number, written))
    if not loops:
        return None
    found = max(reversed(loops.values()), key=lambda turns: turns[-1][1] - turns[0][1])
    numbers = [number for number, _ in found]
    if numbers != list(range(count - len(found), count)):
        return None
    return (0,) * (count - len(found)) + tuple(written for _, written in found)
