"""What preparation found and did, in numbers that a person can check: plan.json keeps it and `finetune data stats` shows it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

Side = Literal["training", "validation"]


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that a person should look at before paying for the run."""

    name: str
    """Such as ``tiny answers``; the names are in `finetune.data.checks` and `finetune.data.arrange`."""
    count: int
    """Rows (pieces of a split row count apart), before weights repeat them."""
    places: tuple[str, ...] = ()
    """The first three, such as ``chat.jsonl:17``; for pairs ``b.jsonl:2 and a.jsonl:2``."""
    advice: str = ""
    """What to do about it, in one sentence."""


@dataclass(frozen=True, slots=True)
class SourceReport:
    """One entry of data.train or data.validation."""

    source: str
    side: Side
    weight: float
    rows: int
    """Rows read."""
    examples: int
    """Examples kept, before the split, duplicates and weights; more than rows where long ones were split."""
    tokens: int
    supervised: int
    """Tokens of these examples, and those that carry loss."""
    over_long: int = 0
    """Rows longer than data.max_tokens, documents included."""
    dropped: int = 0
    """Over-long rows that data.overlong: drop left out."""
    truncated: int = 0
    split: int = 0
    """Over-long rows that were cut into pieces, documents included."""
    longest_row: int = 0
    """Tokens of the longest conversation before anything was cut."""
    unused: dict[str, int] = field(default_factory=dict)
    """Columns that the format passes over, and how many rows have each."""


@dataclass(frozen=True, slots=True)
class SideReport:
    """All training, or all validation examples, as often as an epoch sees them."""

    examples: int = 0
    tokens: int = 0
    supervised: int = 0
    shortest: int = 0
    median: int = 0
    p90: int = 0
    p99: int = 0
    longest: int = 0
    """Lengths in tokens."""
    histogram: tuple[int, ...] = ()
    """Examples in `BINS` equal parts of 1 to data.max_tokens."""

    @property
    def supervised_share(self) -> float:
        """Of all tokens; 0 where there are none."""
        return self.supervised / self.tokens if self.tokens else 0.0


@dataclass(frozen=True, slots=True)
class DataReport:
    """Everything that preparation counted."""

    max_tokens: int = 0
    sources: tuple[SourceReport, ...] = ()
    train: SideReport = field(default_factory=SideReport)
    validation: SideReport = field(default_factory=SideReport)
    findings: tuple[Finding, ...] = ()
    """Only those with a count above zero."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Examples left out after reading, by reason: ``duplicate``, ``near duplicate``, ``validation copy``, ``drawn by no weight``."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` takes it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The report of `as_dict`, also after JSON made lists of tuples."""
        return cls(
            max_tokens=values["max_tokens"],
            sources=tuple(SourceReport(**source) for source in values["sources"]),
            train=_side(values["train"]),
            validation=_side(values["validation"]),
            findings=tuple(Finding(**finding | {"places": tuple(finding["places"])}) for finding in values["findings"]),
            dropped=dict(values["dropped"]),
        )

    def finding(self, name: str) -> Finding:
        """The finding of ``name``; one with count 0 where there is none."""
        return next((finding for finding in self.findings if finding.name == name), Finding(name, 0))

    @property
    def counts(self) -> dict[str, int]:
        """The figures of one screen: rows read, dropped, truncated and doubled; tokens and supervised tokens."""
        counts = {"rows read": sum(source.rows for source in self.sources)}
        policies = {"dropped: over-long": "dropped", "truncated": "truncated", "split": "split"}
        counts |= {name: sum(getattr(source, attribute) for source in self.sources) for name, attribute in policies.items()}
        counts |= {f"dropped: {reason}": count for reason, count in self.dropped.items()}
        counts |= {finding.name: finding.count for finding in self.findings}
        counts = {name: count for name, count in counts.items() if count} | {"duplicate rows": self.finding("duplicate rows").count}
        for name, side in (("training", self.train), ("validation", self.validation)):
            counts |= {f"{name} rows": side.examples, f"{name} tokens": side.tokens, f"{name} supervised tokens": side.supervised}
        return counts


BINS = 20


def _side(values: dict[str, Any]) -> SideReport:
    return SideReport(**values | {"histogram": tuple(values["histogram"])})
