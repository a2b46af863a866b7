"""The file that `finetune init` writes: short, commented, and runnable before the user has brought a model or data."""

from __future__ import annotations

from pathlib import Path

from finetune.config.hints import nearest
from finetune.config.shipped import Recipe, recipes, shipped_directory
from finetune.errors import ConfigError

_TEMPLATE = """\
# yaml-language-server: $schema={schema}
# {summary}
# See every value and its origin with `finetune config show {path}`; the recipe explains its numbers: {recipe_path}
extends: {recipe}

model:
  # A hub id such as meta-llama/Meta-Llama-3-8B-Instruct, or a directory that starts with ./ or /
  id: builtin:smollm2-135m

data:
  train:
    # Your data: a .jsonl, .csv or .parquet file beside this one, with `messages`, `question` and `answer`, or `text`.
    # - source: data/train.jsonl
    - source: builtin:icd10cm   # real medical facts; needs the extra `quickstart`
  max_tokens: 512               # the longest example; longer ones are an error, never cut in silence

# What the recipe chose can be changed here, for example:
# train:
#   epochs: 3
# optimizer:
#   learning_rate: 1e-4

output: runs/{name}
"""


def write_starter(path: Path, recipe_name: str, *, force: bool) -> None:
    """Write a configuration that extends a recipe; an existing file is only replaced by ``force``."""
    recipe = _find(recipe_name)
    if path.is_dir():
        raise ConfigError("this is a directory", where=str(path), fix=f"name a file: `finetune init {path / 'finetune.yaml'}`")
    if path.exists() and not force:
        raise ConfigError("the file exists", where=str(path), fix="choose another name, or overwrite it with `--force`")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(starter(path, recipe), encoding="utf-8")
    except OSError as error:
        problem = error.strerror
    else:
        return
    raise ConfigError(f"cannot write the file: {problem}", where=str(path), fix="choose a directory that you may write to")


def starter(path: Path, recipe: Recipe) -> str:
    """The text of the file."""
    return _TEMPLATE.format(
        schema=shipped_directory("configs") / "finetune.schema.json",
        summary=recipe.summary,
        path=path,
        recipe=recipe.name,
        recipe_path=recipe.path,
        name=path.stem,
    )


def _find(name: str) -> Recipe:
    known = {recipe.name: recipe for recipe in recipes()}
    if name in known:
        return known[name]
    meant = nearest(name, known)
    fix = f"did you mean `--recipe {meant}`?" if meant else f"recipes: {', '.join(known)}"
    raise ConfigError(f"there is no recipe `{name}`", fix=fix)
