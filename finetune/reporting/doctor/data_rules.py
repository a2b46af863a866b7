"""Rules on what preparation counted: rows that did not fit, and rows with little to learn from."""

from __future__ import annotations

from finetune.config.schema import Config
from finetune.reporting.doctor.evidence import Evidence
from finetune.reporting.doctor.findings import Finding
from finetune.reporting.doctor.rule import Rule

_LOST_ROWS = 0.01
"""Of all rows: below it what was lost is an oddity or two."""
_STEP = 64
_LONGER = 4
"""Times data.max_tokens: up to it longer examples are a matter of memory, above it they are another kind of document."""
_LITTLE = 0.05
"""Share of the tokens that carry loss. Questions with answers of one sentence have 0.3 and more."""
_FEW_TOKENS = 256
"""Supervised tokens a step, below which a small share makes steps noisy: the quickstart's have 244 to 272 at a share of 0.57."""


def _lacks_nothing(evidence: Evidence) -> str | None:
    del evidence  # every run records what preparation counted
    return None


def _over_long(evidence: Evidence) -> Finding | None:
    data, sources = evidence.data, [source for source in evidence.data.sources if source.side == "training"]
    rows, lost = sum(source.rows for source in sources), sum(source.dropped + source.truncated for source in sources)
    if not rows or lost < _LOST_ROWS * rows:
        return None
    longest = max(source.longest_row for source in sources)
    done = "dropped" if evidence.config.data.overlong == "drop" else "cut off"
    measured = {"rows": rows, "rows lost or cut": lost, "data.max_tokens": data.max_tokens, "tokens of the longest": longest}
    what = f"{lost} of {rows} rows are longer than {data.max_tokens} tokens and were {done}"
    reason = "a row that is cut off teaches to stop in the middle" if done == "cut off" else "what is only said at length is never learned"
    enough = -(-longest // _STEP) * _STEP
    most = min(_LONGER * data.max_tokens, evidence.context or enough)
    override = f"data.max_tokens={enough}" if enough <= most else "data.overlong=split"
    return Finding("over-long-rows", "problem", what, measured, reason, (override,))


def _few_supervised(evidence: Evidence) -> Finding | None:
    side, config = evidence.data.train, evidence.config
    a_step = side.supervised / side.examples * config.train.batch_size if side.examples else 0.0
    last_turn = config.data.supervise == "last-turn"
    if not side.examples or side.supervised_share >= _LITTLE or (a_step >= _FEW_TOKENS and not last_turn):
        return None
    measured = {
        "share of tokens that carry loss": side.supervised_share,
        "supervised tokens a step": a_step,
        "training rows": side.examples,
    }
    what = f"{side.supervised_share:.1%} of the tokens carry loss, {a_step:.0f} a step"
    reason = "the model reads the rest and learns nothing from it, and the few tokens of a step make its gradient noisy"
    return Finding("few-supervised-tokens", "advice", what, measured, reason, _more_supervised(config, a_step))


def _more_supervised(config: Config, a_step: float) -> tuple[str, ...]:
    if config.data.supervise == "last-turn":
        return ("data.supervise=assistant",)
    return (f"train.batch_size={config.train.batch_size * max(2, round(_FEW_TOKENS / max(a_step, 1.0)))}",)


DATA_RULES = (
    Rule("over-long-rows", "rows that were dropped or cut off", _lacks_nothing, _over_long),
    Rule("few-supervised-tokens", "rows of which hardly a token carries loss", _lacks_nothing, _few_supervised),
)
