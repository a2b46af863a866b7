"""Writes what is generated: docs/config.md, cli.md, methods.md, the README's table of methods, and the JSON Schemas of the YAML files.

python docs/build.py            write
python docs/build.py --check    exit 1 if a file is stale
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout, whatever else is installed

from finetune.cli.app import app  # noqa: E402
from finetune.config.combine import plan_schema  # noqa: E402
from finetune.config.json_schema import config_schema, preset_schema, to_text  # noqa: E402
from finetune.config.reference import config_reference  # noqa: E402
from finetune.config.sweep import sweep_schema  # noqa: E402

sys.path.insert(0, str(ROOT / "docs"))

from methods_page import RECORD, methods_page, summary_table  # noqa: E402

_CLI_INTRODUCTION = """\
# Command line

This page is generated from the commands' help by `docs/build.py`.

Results go to stdout, everything else to stderr. Exit codes: 0 done; 1 a bug; 2 configuration or command line; 3 data; 4 hardware or memory;
5 training diverged; 6 verification failed; 130 or 143 interrupted, with a checkpoint saved.
"""

_METHODS_BEGIN = "<!-- methods: written by docs/build.py -->\n"
_METHODS_END = "<!-- end of methods -->\n"


def generated() -> dict[Path, str]:
    """Every generated file with its text."""
    return {
        ROOT / "docs" / "config.md": config_reference(),
        ROOT / "docs" / "cli.md": cli_reference(),
        ROOT / "docs" / "methods.md": methods_page(),
        ROOT / "README.md": readme(),
        ROOT / "configs" / "finetune.schema.json": to_text(config_schema()),
        ROOT / "configs" / "combine.schema.json": to_text(plan_schema()),
        ROOT / "configs" / "sweep.schema.json": to_text(sweep_schema()),
        ROOT / "recipes" / "preset.schema.json": to_text(preset_schema()),
    }


def readme() -> str:
    """The README with its table of methods as the matrix found it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    before, found, rest = text.partition(_METHODS_BEGIN)
    _, end, after = rest.partition(_METHODS_END)
    if not (found and end):
        raise SystemExit(f"README.md lacks the lines {_METHODS_BEGIN.strip()} and {_METHODS_END.strip()}")
    return before + _METHODS_BEGIN + summary_table(json.loads(RECORD.read_text(encoding="utf-8"))) + _METHODS_END + after


def cli_reference() -> str:
    """Every command with its arguments and options."""
    return "\n".join([_CLI_INTRODUCTION, *_command("finetune", typer.main.get_command(app))])


def _command(name: str, command: Any) -> Iterator[str]:
    context = command.make_context(name, ["--help"], resilient_parsing=True)
    yield f"## `{name}`\n\n```\n{name} {' '.join(command.collect_usage_pieces(context))}\n```\n"
    yield f"{inspect.cleandoc(command.help or '')}\n"
    rows = [_parameter(parameter) for parameter in command.params if not getattr(parameter, "hidden", False)]
    if rows:
        yield "\n".join(["| | |", "|---|---|", *rows]) + "\n"
    for inner in getattr(command, "commands", {}).values():
        yield from _command(f"{name} {inner.name}", inner)


def _parameter(parameter: Any) -> str:
    is_option = parameter.param_type_name == "option"
    names = ", ".join(parameter.opts) if is_option else parameter.metavar or parameter.name.upper()
    takes_value = is_option and not parameter.is_flag
    value = f" {parameter.metavar or parameter.name.upper()}" if takes_value else ""
    default = f" Default: `{parameter.default}`." if _has_default(parameter) else ""
    return f"| `{names}{value}` | {parameter.help or ''}{default} |"


def _has_default(parameter: Any) -> bool:
    return isinstance(parameter.default, (str, int, float, Path)) and not isinstance(parameter.default, bool)


def main() -> int:
    stale = [path for path, text in generated().items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"stale: {path.relative_to(ROOT)} (run `python docs/build.py`)", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(generated()[path], encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
