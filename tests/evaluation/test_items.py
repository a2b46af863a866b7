"""What figures were summed from: written, read, and enough to compute every figure again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from finetune.errors import VerificationError
from finetune.evaluation.comparison import Measurement, side_by_side
from finetune.evaluation.items import read_items, write_items
from finetune.evaluation.statistics import mean, ratio
from finetune.runs import items_path
from finetune.sealed import sha256_of

FACTS = [f"A{place // 3:02}" for place in range(36)]  # three wordings of twelve facts


def _measured(seed: int) -> Measurement:
    draw = np.random.default_rng(seed)
    losses = ratio("a: loss", "nats/token", "lower", (draw.gamma(2.0, size=36), draw.integers(1, 9, 36)), FACTS)
    perplexity = ratio("a: perplexity", "", "lower", (losses.numerators, losses.denominators), range(36), "exp")
    return Measurement((losses, perplexity, mean("a: right", "share", "higher", draw.integers(0, 2, 36), FACTS)))


def _keep(folder: Path) -> tuple[Path, dict[str, dict[str, Measurement]]]:
    measured = {"knowledge": {"base": _measured(0), "tuned": _measured(1)}}
    results = folder / "eval" / "results.json"
    digest = write_items(results, measured)
    results.write_text(json.dumps({"record": {"items": digest}}))
    return results, measured


def test_every_figure_interval_and_change_is_computed_again_from_the_items(tmp_path: Path) -> None:
    results, measured = _keep(tmp_path)
    again = read_items(results)
    figures, _ = side_by_side("knowledge", measured["knowledge"])
    for one, other in zip(figures, side_by_side("knowledge", again["knowledge"])[0], strict=True):
        assert (one.name, one.unit, one.better) == (other.name, other.unit, other.better)
        assert one.values == pytest.approx(other.values, rel=1e-8)
        assert {name: list(ends) for name, ends in one.intervals.items()} == {
            name: pytest.approx(ends, rel=1e-8) for name, ends in other.intervals.items()
        }
        first, second = one.changes["tuned"], other.changes["tuned"]
        assert (first.difference, first.low, first.high, first.p) == pytest.approx((second.difference, second.low, second.high, second.p))
    assert again["knowledge"]["base"].quantities[0].n == 12  # facts, not wordings


@pytest.mark.parametrize("damage", ["absent", "other", "broken"])
def test_items_that_are_not_those_of_the_results_are_refused(tmp_path: Path, damage: str) -> None:
    results, _ = _keep(tmp_path)
    path = items_path(results)
    if damage == "absent":
        path.unlink()
    elif damage == "other":
        write_items(results, {"knowledge": {"base": _measured(2)}})
    else:
        found = json.loads(path.read_text())
        del found["knowledge"]["a: loss"]["systems"]["tuned"]
        path.write_text(json.dumps(found))
        results.write_text(json.dumps({"record": {"items": sha256_of(path)}}))
    with pytest.raises(VerificationError):
        read_items(results)
