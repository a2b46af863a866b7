"""`finetune data preview | stats`: what the model will see, before a GPU is paid for."""

from __future__ import annotations

import json
import random
import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from finetune import api
from finetune.cli.options import ConfigPath, Json, Overrides

if TYPE_CHECKING:
    from finetune.data.render import Example, Renderer

app = typer.Typer(help="See the data as the model will.", no_args_is_help=True)


@app.command()
def preview(
    config: ConfigPath,
    override: Overrides = None,
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="How many examples.")] = 3,
    order: Annotated[Literal["first", "longest", "random"], typer.Option("--order", help="Which examples.")] = "first",
    ids: Annotated[bool, typer.Option("--ids", help="Print token ids too.")] = False,
) -> None:
    """Show training examples with the tokens that carry loss: green in a terminal, between [[ and ]] in a pipe."""
    from finetune.cli import view

    renderer, train, _, _ = api.prepare_data(api.load_config(config, override or ()).config)
    for example in _chosen(list(train), count, order):
        view.out.rule(f"{example.where}: {len(example.ids)} tokens, {example.supervised} supervised", style="dim")
        view.out.print(_shown(renderer, example, colour=view.out.is_terminal))
        if ids:
            view.out.print(str(list(example.ids)), style="dim")


@app.command()
def stats(config: ConfigPath, override: Overrides = None, as_json: Json = False) -> None:
    """Count rows, tokens and supervised tokens, and what was dropped, truncated or doubled."""
    from finetune.cli import view

    _, train, _, counts = api.prepare_data(api.load_config(config, override or ()).config)
    lengths = sorted(len(example.ids) for example in train)
    found = {**counts, "shortest row": lengths[0], "median row": lengths[len(lengths) // 2], "longest row": lengths[-1]}
    if as_json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
        return
    for name, value in found.items():
        view.out.print(f"{name:<30}{value:>14,}")


def _chosen(examples: list[Example], count: int, order: str) -> list[Example]:
    if order == "longest":
        return sorted(examples, key=lambda example: -len(example.ids))[:count]
    if order == "random":
        return random.Random(0).sample(examples, min(count, len(examples)))
    return examples[:count]


def _shown(renderer: Renderer, example: Example, *, colour: bool) -> Any:
    """The example's text, token by token, with supervised stretches set off."""
    from rich.text import Text

    shown, start = Text(), 0
    for position in range(1, len(example.ids) + 1):
        if position == len(example.ids) or example.mask[position] != example.mask[start]:
            text = renderer.tokenizer.decode(example.ids[start:position])
            marked = f"[[{text}]]" if example.mask[start] and not colour else text
            shown.append(marked, style="green" if example.mask[start] else "dim")
            start = position
    return shown
