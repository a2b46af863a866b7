"""docs/evidence/README.md and its plot: generated from the files of the runs, no number or verdict of it written by hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.evidence.claims import MATCHED, Arms, at_an_end, best, by_arm, matched, told, verdicts
from benchmarks.evidence.records import FIGURES, Run
from finetune.analysis.plot import Mark, Plane, plane_svg
from finetune.config.schema import Config, Icd10cm

NOTHING = "\u2013"
ARMS = {
    "full": "every weight",
    "lora-attention": "LoRA r={rank} on attention alone",
    "lora": "LoRA r={rank} on all linear layers",
    "rslora": "rsLoRA r={rank}",
    "nf4": "LoRA r={rank} on NF4",
    "loftq": "the same, started by LoftQ",
    "differential": "LoRA r={rank}, embeddings too; rates {rates}",
    "trifecta": "rsLoRA r={rank}, LoftQ on NF4, embeddings too; rates {rates}",
    "lora-plus": "LoRA+: B at {ratio} times the rate of A",
    "dora": "DoRA r={rank}",
    "shuffled": "LoRA r={rank} on shuffled answers (control)",
}
_PAIRS = (
    ("lora", "full"),
    ("trifecta", "full"),
    ("dora", "full"),
    ("rslora", "lora"),
    ("differential", "lora"),
    ("trifecta", "lora"),
    ("lora-plus", "lora"),
    ("dora", "lora"),
    ("loftq", "nf4"),
    ("lora-attention", "lora"),
)
_COLUMNS = ("learned", "control", "style", "memory", "gap", "forgotten", "efficiency")

CAUTIONS = f"""\
- One model ({{model}}), one seed, {{trained}} facts and few tokens. Nothing here says what another, larger model would do, and a rank
  can show little of its worth in so few tokens. LoftQ's gain is known to be large at 2 or 3 bits and small at 4.
- "No difference seen" says that the intervals are too wide to see one, not that there is none.
- Under Adam the first update of (alpha/r)BA does not depend on the rank, and alpha/sqrt(r) multiplies it: at one rate, LoRA against rsLoRA
  compares rates. So each arm has three, which span the same range of rank x scale x rate; but full tuning, where that means nothing,
  has a tenth of LoRA's rates, and LoRA+ has that range for neither A nor B. Where the best is the lowest or the highest rate ("an end
  of its grid"), a better one may lie beyond.
- The best of three rates is chosen by the figure that is then shown, which favours every arm a little, and noisy ones most. In the
  claims it is chosen anew in every resample, so that their intervals have that in them; those of the table of arms have not.
- "Forgets less" is only said of two runs that learned alike (within {MATCHED:.0%}, with no difference to be seen), never of arms each
  at some rate.
- Two runs are compared on the same facts, drawn together. The intervals are over facts: what another seed, another order or other
  wordings would change is in none of them. Of the {{claims}} claims, one in twenty would look like a difference by chance alone.
- A change is measured against the run's own base. For NF4 that is the quantized model, for LoftQ the one it starts from: what quantization
  itself costs is in the column *base*, not under *forgotten*.
- Reading titles makes them likelier whichever name they stand beside, so the loss of answers falls with shuffled answers too. *Learned* is
  binding, which only knowing which name has which title can raise.
- General text is some 2,000 tokens of plain English written for this purpose. Skills that it does not show may be lost or kept.
- A term and its title share no word of four letters, but some share a stem or an acronym. Binding is a change from the base, so that what
  can be guessed is not counted as learned; it only makes such facts easier.
"""


def readme(runs: Sequence[Run], config: Config, scale: str) -> str:
    """The page of ``runs``, in the order of their sweep; ``config`` is what they share."""
    arms = by_arm(runs)
    claims = list(verdicts(arms))
    parts = [
        "# Evidence: what each method learns, and what it forgets",
        _intro(config, scale),
        _state(runs),
        "## What held, and what did not",
        "Difference with its 95 % interval, in nats a token; each arm at its best learning rate, chosen anew in every resample.",
        _table(("claim", "outcome", "from"), [(one.claim, f"**{one.outcome}**", one.from_ or NOTHING) for one in claims]),
        "## Each arm at its best rate",
        _meanings(),
        _table(("arm", "rate", *_COLUMNS), list(_best_rows(arms))),
        *([_plot_text(scale)] if has_plot(runs) else []),
        "## Pairs that learned alike",
        f"Of two arms, the runs whose learning differs least, by at most {MATCHED:.0%} of the larger; positive: the first learned or "
        "forgot more.",
        _table(("arms", "learned", "difference", "forgotten", "difference"), list(_pair_rows(arms))),
        "## Every run",
        _table(("run", "tokens", "base", "learned, by loss", "learned, by choice", *_COLUMNS), [_run_row(run, scale) for run in runs]),
        "## Cautions",
        CAUTIONS.format(claims=len(claims), model=config.model.id, trained=_trained(config)).rstrip(),
    ]
    return "\n\n".join(parts) + "\n"


def _intro(config: Config, scale: str) -> str:
    facts = _facts(config)
    command = "make evidence" if scale == "cpu" else f"make evidence SCALE={scale}"
    return (
        f"Generated by `{command}` from the files of the runs, which lie in runs/{scale}; the "
        f"sweep is [{scale}.yaml](../../benchmarks/evidence/{scale}.yaml). No number or verdict is written by hand.\n\n"
        f"Every run teaches `{config.model.id}` the same {_trained(config)} facts of ICD-10-CM (a disease's other name and its "
        f"official title), "
        f"{facts.document_facts} as sentences alone and {facts.question_facts} as questions too, in the same order, {config.train.epochs} "
        f"times, with seed {config.seed}. {facts.control_facts} further facts are never trained: what those gain is style. "
        "Test questions use wordings that no training row has. The control *shuffled* reads the same terms and titles as often, wrongly "
        "paired."
    )


def _facts(config: Config) -> Icd10cm:
    return next(source for source in config.data.train if isinstance(source, Icd10cm))


def _trained(config: Config) -> int:
    return _facts(config).document_facts + _facts(config).question_facts


def _state(runs: Sequence[Run]) -> str:
    measured = [run for run in runs if run.numbers]
    missing = [run for run in runs if not run.numbers]
    if not measured:
        return "**Not measured.** No run has been made yet; the tables below show what will be filled in."
    tokens = [run.tokens for run in measured]
    spread = f"{min(tokens):,}" if min(tokens) == max(tokens) else f"{min(tokens):,} to {max(tokens):,}"
    minutes = sum(run.seconds for run in measured) / 60
    said = [f"{len(measured)} of {len(runs)} runs, {spread} tokens each, {minutes:.0f} minutes of steps and measuring."]
    said += [f"Made with: {made}." for made in dict.fromkeys(run.made_with for run in measured)]
    if missing:
        listed = "; ".join(f"{run.case.run.name} ({run.why_not})" for run in missing)
        said.append(f"**Not all was measured**, and nothing is said of: {listed}.")
    return " ".join(said)


def _meanings() -> str:
    return (
        "*learned*: by how much likelier, a token, the right title became after its own question than after those of other facts "
        "(binding), in wordings never trained, beyond what facts never trained gained. *control*: change of binding of facts "
        "never trained. "
        "*style*: change of their answer loss. "
        "*memory*: binding in trained words. *gap*: what facts also trained as questions gained beyond the others. *forgotten*: change of "
        "loss on general text. "
        f"*efficiency*: what was learned for each 0.01 forgotten; {NOTHING} where none was seen to be. Brackets: 95 % intervals."
    )


def _best_rows(arms: Arms) -> Iterator[tuple[str, ...]]:
    for arm, runs in arms.items():
        run = best(runs)
        name = f"{arm}: {_described(arm, runs[0].case.settings)}" if arm in ARMS else arm
        if run is None:
            yield (name, "not measured", *(NOTHING for _ in _COLUMNS))
        else:
            edge = " (an end of its grid)" if at_an_end(run, runs) else ""
            yield (name, f"{run.rate:g}{edge}", *(_cell(run, column) for column in _COLUMNS))


def _described(arm: str, settings: Mapping[str, Any]) -> str:
    groups = settings.get("optimizer.groups", {})
    rates = ", ".join(f"{group['lr_ratio']:g} ({name})" for name, group in groups.items())
    return ARMS[arm].format(rank=settings.get("tuning.rank"), rates=rates, ratio=settings.get("optimizer.lora_plus_ratio"))


def _pair_rows(arms: Arms) -> Iterator[tuple[str, ...]]:
    for one, other in _PAIRS:
        name = f"{one}, {other}"
        measured = best(arms.get(one, ())), best(arms.get(other, ()))
        if None in measured:
            yield name, "not measured", NOTHING, NOTHING, NOTHING
            continue
        pair = matched(arms[one], arms[other])
        if pair is None:
            yield name, "no two runs learned alike", NOTHING, NOTHING, NOTHING
            continue
        learned, forgotten = (
            f"{pair.one.numbers[column].value:+.2f} at {pair.one.rate:g}, {pair.other.numbers[column].value:+.2f} at {pair.other.rate:g}"
            for column in ("learned", "forgotten")
        )
        yield name, learned, told(pair.learned), forgotten, told(pair.forgotten)


def _run_row(run: Run, scale: str) -> tuple[str, ...]:
    name = run.case.run.name
    if not run.numbers:
        return name, run.why_not, *(NOTHING for _ in range(3 + len(_COLUMNS)))
    base = NOTHING if run.base_loss is None else f"{run.base_loss:.2f}"
    columns = ("learned, by loss", "learned, by choice", *_COLUMNS)
    return f"[{name}](runs/{scale}/{name}.json)", f"{run.tokens:,}", base, *(_cell(run, column) for column in columns)


def _cell(run: Run, column: str) -> str:
    return told(run.numbers[column]) if column in run.numbers else NOTHING


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


# --- the plane -----------------------------------------------------------------------------------------------------------------------


def plot_name(scale: str) -> str:
    """File of the plot, beside the page."""
    return f"{scale}.svg"


def _plot_text(scale: str) -> str:
    image = f"![What each run learned against what it forgot]({plot_name(scale)})"
    return f"{image}\n\nRight: more learned; up: more forgotten; an arm's rates are joined."


def has_plot(runs: Sequence[Run]) -> bool:
    """Whether any run can be drawn."""
    return any({"learned", "forgotten"} <= run.numbers.keys() for run in runs)


def plot(runs: Sequence[Run]) -> str:
    """The learning-forgetting plane as SVG."""
    series = tuple(
        (arm, tuple(_mark(run) for run in found if {"learned", "forgotten"} <= run.numbers.keys())) for arm, found in by_arm(runs).items()
    )
    plane = Plane("learned (nats a token of binding)", "forgotten (nats a token of general text)", tuple(one for one in series if one[1]))
    return plane_svg(
        "Learned against forgotten", [f"{FIGURES['learned']}, against {FIGURES['forgotten']}; bars are 95 % intervals."], plane
    )


def _mark(run: Run) -> Mark:
    learned, forgotten = run.numbers["learned"], run.numbers["forgotten"]
    return Mark(learned.value, forgotten.value, (learned.low, learned.high), (forgotten.low, forgotten.high))
