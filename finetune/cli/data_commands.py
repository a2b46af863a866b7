"""`finetune data preview | stats`: what the model will see, before a GPU is paid for."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from finetune import api
from finetune.cli.options import ConfigPath, Json, Overrides
from finetune.errors import ConfigError

if TYPE_CHECKING:
    from finetune.cli.preview import Order
    from finetune.training.inputs import Inputs

app = typer.Typer(help="See the data as the model will.", no_args_is_help=True)


@app.command()
def preview(  # noqa: PLR0913 - one parameter an option
    config: ConfigPath,
    override: Overrides = None,
    count: Annotated[int | None, typer.Option("-n", "--count", min=1, help="How many examples; 3 if not stated.")] = None,
    order: Annotated[
        Literal["first", "longest", "shortest", "random"] | None, typer.Option("--order", help="Which examples; the first if not stated.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Draw of `--order random`; 0 if not stated.")] = None,
    index: Annotated[
        list[int] | None, typer.Option("--index", min=0, metavar="N", help="The example with this number, counted from 0; repeatable.")
    ] = None,
    validation: Annotated[bool, typer.Option("--validation", help="Look at validation examples.")] = False,
    ids: Annotated[bool, typer.Option("--ids", help="Print token ids too.")] = False,
    as_json: Json = False,
) -> None:
    """Show examples with the tokens that carry loss: green in a terminal, between [[ and ]] in a pipe.

    Characters that a terminal would obey or hide are written out, and brackets like the marks get a backslash each.
    --json has the exact text.
    """
    from finetune.cli import preview as shown
    from finetune.cli import view

    _require_together(index, count, order, seed)
    inputs = _prepared(config, override or ())
    examples, side = (inputs.data.validation, "validation") if validation else (inputs.data.train, "training")
    if not len(examples):
        raise ConfigError("there is no validation data", where=str(config), fix="state `data.validation`, or leave out --validation")
    shown.require_numbers(index or (), examples, side)
    chosen = index or shown.choose(examples, count or 3, order or "first", seed or 0)
    rows = [
        (number, example, list(shown.stretches(example, inputs.renderer.tokenizer))) for number in chosen for example in [examples[number]]
    ]
    if as_json:
        found = [shown.as_json(number, example, parts, ids=ids) for number, example, parts in rows]
        _print_json({"side": side, "of": len(examples), "examples": found})
        return
    for number, example, parts in rows:
        view.show_example(
            f"{side} example {number} of {len(examples):,}: {shown.visible(example.where)}, "
            f"{len(example.ids):,} tokens, {sum(example.mask):,} with loss",
            shown.marked(parts, colour=view.has_colour()),
            example.ids if ids else (),
            last=number == rows[-1][0],
        )
    if not view.has_colour() and any(shown.has_marks(parts) for _, _, parts in rows):
        view.note("the text itself holds [[ or ]], shown with a backslash before each bracket; --json has it exactly")


@app.command()
def stats(config: ConfigPath, override: Overrides = None, as_json: Json = False) -> None:
    """Count rows, tokens and supervised tokens of every source, and show lengths, what was changed or left out, and what looks wrong."""
    inputs = _prepared(config, override or ())
    from finetune.cli import stats as shown
    from finetune.data.fit import fit, histogram

    report, lengths = inputs.data.report, inputs.data.train.lengths
    found, padding = fit(lengths, report), api.padding_share(api.load_config(config, override or ()).config, inputs)
    if as_json:
        _print_json(shown.as_json(report, found, padding, inputs.data.fingerprint))
    else:
        shown.show(report, found, padding, histogram(lengths, bins=12))


def _prepared(config: Path, overrides: Sequence[str]) -> Inputs:
    from finetune.cli import view

    with view.preparing() as progress:
        return api.prepare_data(api.load_config(config, overrides).config, progress)


def _require_together(index: list[int] | None, count: int | None, order: Order | None, seed: int | None) -> None:
    """ConfigError for options that another would make void."""
    void = [name for name, value in (("-n", count), ("--order", order), ("--seed", seed)) if value is not None]
    if index and void:
        raise ConfigError(f"--index names the examples, so {void[0]} would do nothing", where=void[0], fix="leave one of them out")
    if seed is not None and order != "random":
        raise ConfigError("--seed is the draw of `--order random`", where="--seed", fix="add `--order random`, or leave it out")


def _print_json(value: object) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")
