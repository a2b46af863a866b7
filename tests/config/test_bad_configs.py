"""A table of bad configurations: the line that is pointed to, what is said, and what to do instead."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

MODEL = "model: {id: owner/name}\n"
TUNING = "tuning: {method: lora}\n"
DATA = "data: {train: [{source: /data/train.jsonl}], validation: {fraction: 0.1}}\n"
OUTPUT = "output: runs/test\n"
BASE = MODEL + TUNING + DATA + OUTPUT
ICD10CM = "data: {train: [{source: 'builtin:icd10cm'}], validation: {fraction: 0.1}}\n"


@dataclasses.dataclass(frozen=True)
class Bad:
    """A configuration that must be refused."""

    name: str
    text: str | bytes
    at: str
    """The offending line, or a part of it; empty where the whole file is meant."""
    what: str
    fix: str = ""
    overrides: tuple[str, ...] = ()


def bomb(levels: int = 9) -> str:
    """Each list repeats the one before nine times: 9^9 values in a few hundred bytes."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines) + "\n" + BASE


TABLE = [
    # --- files that are no configuration
    Bad("empty file", "", "", "the file is empty", "finetune init"),
    Bad("only comments", "# nothing\n\n", "", "the file is empty", "finetune init"),
    Bad("a list instead of a mapping", "- model\n- data\n", "- model", "a configuration is a mapping of sections"),
    Bad("a sentence", "train my model please\n", "train my model", "a configuration is a mapping of sections"),
    Bad("binary file", b"\x7fELF\x02\x01\x01\x00\x00\x00", "", "this is a binary file"),
    Bad("not UTF-8", b"model: {id: \xff\xfe}\n", "", "not UTF-8 text"),
    Bad("UTF-16 with a byte order mark", BASE.encode("utf-16"), "", "not UTF-8 text", "save it as UTF-8"),
    Bad("10 MB", b"# " + b"x" * 10_000_000, "", "larger than a configuration can be", "data.train"),
    Bad("a control character", BASE + "seed: \x07\n", "seed:", "a control character"),
    # --- YAML
    Bad("tab as indentation", "model:\n\tid: owner/name\n", "id: owner/name", "a tab stands where YAML wants spaces", "indent with spaces"),
    Bad("unclosed bracket", BASE + "evaluation: {samples: 3\n", "", "a bracket is not closed", "close every [ and {"),
    Bad("unclosed quotation mark", BASE + 'seed: "0\n', "", "a quotation mark is not closed"),
    Bad("indentation off by one", "model:\n  id: a/b\n   revision: null\n", "revision: null", "that YAML cannot place", "indent keys"),
    Bad("key without a space", BASE + "seed:3\n", "", "a key without `:`", "space after the colon"),
    Bad("duplicate key", BASE + "seed: 1\nseed: 2\n", "seed: 2", "`seed` is given twice; the first is on line 5", "keep one"),
    Bad("duplicate key inside", BASE + "train:\n  epochs: 1\n  epochs: 2\n", "epochs: 2", "`epochs` is given twice"),
    Bad("python tag", BASE + "seed: !!python/object/apply:os.system ['true']\n", "seed:", "YAML tags"),
    Bad("plain tag", BASE + "seed: !!int '3'\n", "seed:", "YAML tags"),
    Bad("own tag", BASE + "seed: !env SEED\n", "seed:", "YAML tags"),
    Bad("tag on a key", BASE + "!!str seed: 3\n", "seed", "YAML tags"),
    Bad("alias bomb", bomb(), "*a", "more than 20000 values"),
    Bad("alias inside itself", "a: &a [*a]\n" + BASE, "*a", "before or inside the value it repeats"),
    Bad("unknown alias", BASE + "seed: *nowhere\n", "*nowhere", "before or inside the value it repeats"),
    Bad("merge key", "base: &b {a: 1}\nmodel: {<<: *b}\n", "<<", "merge keys", "extends"),
    Bad("nested too deep", BASE + "seed: " + "[" * 50 + "]" * 50 + "\n", "seed:", "nested deeper than"),
    Bad("nested far too deep", "[" * 100_000, "[", "nested deeper than"),
    Bad("two documents", BASE + "---\n" + BASE, "---", "a second document"),
    Bad("list as key", BASE + "? [a, b]\n: 3\n", "[a, b]", "a key must be a word"),
    Bad("lone surrogate", BASE + 'seed: "\\ud800"\n', "ud800", "half a character"),
    # --- extends
    Bad("extends a number", "extends: 3\n" + BASE, "extends: 3", "`extends` names a recipe"),
    Bad("extends nothing", "extends: []\n" + BASE, "extends: []", "`extends` names a recipe"),
    Bad(
        "unknown recipe",
        "extends: domain-knowlege\n" + BASE,
        "domain-knowlege",
        "there is no recipe",
        "did you mean `extends: domain-knowledge`?",
    ),
    Bad(
        "missing preset",
        "extends: ../presets/mine.yaml\n" + BASE,
        "mine.yaml",
        "there is no file `../presets/mine.yaml`",
        "shipped recipes",
    ),
    Bad("extends itself", "extends: config.yaml\n" + BASE, "config.yaml", "`extends` goes one level deep"),
    Bad(
        "extends inside a section",
        "model: {id: a/b, extends: style}\n" + TUNING + DATA + OUTPUT,
        "extends",
        "unknown key `extends`",
        "top level",
    ),
    # --- keys
    Bad("misspelt section", BASE + "optimiser: {}\n", "optimiser", "unknown key `optimiser`", "did you mean `optimizer`?"),
    Bad("misspelt key", BASE + "train: {epoch: 3}\n", "epoch", "unknown key `epoch` in `train`", "did you mean `epochs`?"),
    Bad("misspelt discriminator", BASE + "quantization: {metod: nf4}\n", "metod", "unknown key `metod`", "did you mean `method`?"),
    Bad("key of another section", BASE + "train: {rank: 64}\n", "rank", "unknown key `rank` in `train`", "`rank` belongs to `tuning`"),
    Bad("key at the top", BASE + "epochs: 3\n", "epochs", "unknown key `epochs` at the top level", "`epochs` belongs to `train`"),
    Bad(
        "key of another method",
        MODEL + "tuning: {method: full, rank: 8}\n" + DATA + OUTPUT,
        "rank",
        "unknown key `rank`",
        "`rank` goes with `method: lora | tied-lora | adalora",
    ),
    Bad(
        "double quantization of int8",
        BASE + "quantization: {method: int8, double_quant: true}\n",
        "double_quant",
        "unknown key",
        "method: nf4 | fp4",
    ),
    Bad(
        "axolotl's name",
        MODEL + "tuning: {method: lora, lora_r: 64}\n" + DATA + OUTPUT,
        "lora_r",
        "unknown key",
        "`lora_r` is called `tuning.rank` here",
    ),
    Bad("TRL's name", BASE + "per_device_train_batch_size: 4\n", "per_device", "unknown key", "over ALL devices"),
    Bad("bitsandbytes' name", BASE + "load_in_4bit: true\n", "load_in_4bit", "unknown key", "`quantization.method: nf4`"),
    Bad("not yet: packing", BASE + "sample_packing: true\n", "sample_packing", "unknown key", "is not available in this version"),
    Bad(
        "not yet: remote code",
        BASE + "trust_remote_code: true\n",
        "trust_remote",
        "unknown key",
        "models that bring their own code are not run",
    ),
    Bad("missing sections", "seed: 3\n", "", "`model` is missing", "add `model: {id:"),
    Bad("missing id", "model: {revision: null}\n" + TUNING + DATA + OUTPUT, "model:", "`model.id` is missing", "add `id:"),
    Bad("missing method", MODEL + "tuning: {rank: 8}\n" + DATA + OUTPUT, "tuning:", "`tuning.method` is missing", "`lora`, `tied-lora`"),
    Bad("section without content", "model:\nid: a/b\n" + TUNING + DATA + OUTPUT, "model:", "`model` has nothing under it", "indent"),
    # --- shapes
    Bad(
        "word for a section", "model: owner/name\n" + TUNING + DATA + OUTPUT, "model:", "it must be a mapping", "`model: {id: owner/name}`"
    ),
    Bad("word for a union", BASE + "quantization: nf4\n", "nf4", "it must be a mapping", "`quantization: {method: nf4}`"),
    Bad(
        "unknown word for a union", BASE + "quantization: gptq\n", "gptq", "it must be a mapping", "`gptq` is not available in this version"
    ),
    Bad("list for a section", BASE + "optimizer: [adamw]\n", "[adamw]", "`optimizer` is a list; it must be a mapping"),
    Bad("word for a schedule", BASE + "schedule: linear\n", "linear", "it must be a mapping", "`schedule: {method: linear}`"),
    Bad("switch for a section", BASE + "tracking: wandb\n", "wandb", "it must be a mapping", "`tracking: {wandb: true}`"),
    Bad("path for a list", MODEL + TUNING + "data: {train: a.jsonl}\n" + OUTPUT, "a.jsonl", "it must be a list", "[{source: a.jsonl}]"),
    Bad("mapping for a list", MODEL + TUNING + "data: {train: {source: a.jsonl}}\n" + OUTPUT, "source", "it must be a list"),
    Bad("path in a list", MODEL + TUNING + "data: {train: [a.jsonl]}\n" + OUTPUT, "a.jsonl", "it must be a mapping", "{source: a.jsonl}"),
    Bad("no sources", MODEL + TUNING + "data: {train: []}\n" + OUTPUT, "train: []", "is an empty list"),
    Bad(
        "fraction without its key",
        MODEL + TUNING + "data: {train: [{source: a}], validation: 0.02}\n" + OUTPUT,
        "0.02",
        "it must be a mapping",
        "{fraction: 0.02}",
    ),
    Bad("task by its name", BASE + "evaluation: {tasks: [loss]}\n", "loss", "it must be a mapping", "`{task: loss}`"),
    Bad(
        "number for the model",
        "model: {id: 7}\n" + TUNING + DATA + OUTPUT,
        "id: 7",
        "`model.id` is 7; allowed: text",
        'quotation marks: "7"',
    ),
    # --- values
    Bad("quoted number", BASE + "seed: '3'\n", "'3'", '`seed` is the text "3"', "remove the quotation marks"),
    Bad("fraction of a count", BASE + "train: {epochs: 1.5}\n", "1.5", "allowed: a whole number of at least 1"),
    Bad("count with a point", BASE + "train: {batch_size: 64.0}\n", "64.0", "`train.batch_size` is 64.0", "write 64"),
    Bad("count with separators", BASE + "train: {max_steps: 1_000}\n", "1_000", "a whole number", "write 1000, without separators"),
    Bad("count in thousands", BASE + "train: {tokens_per_device: 4k}\n", "4k", "a whole number", "4000 or 4096"),
    Bad("yes for a switch", BASE + "tracking: {wandb: yes}\n", "yes", "allowed: true or false", "in YAML 1.2 `yes` is a word"),
    Bad("rate of two", BASE + "optimizer: {learning_rate: 2}\n", "2", "allowed: a number above 0 and up to 1", "between 1e-5 and 1e-3"),
    Bad(
        "dropout in percent", MODEL + "tuning: {method: lora, dropout: 10}\n" + DATA + OUTPUT, "10", "`tuning.dropout` is 10", "10 % is 0.1"
    ),
    Bad(
        "dropout with a percent sign",
        MODEL + "tuning: {method: lora, dropout: 5%}\n" + DATA + OUTPUT,
        "5%",
        "dropout",
        "write the share: 0.05",
    ),
    Bad("warm-up steps as ratio", BASE + "schedule: {warmup_ratio: 100}\n", "100", "allowed: a number from 0 to 1", "warmup_steps"),
    Bad(
        "negative rank",
        MODEL + "tuning: {method: lora, rank: -3}\n" + DATA + OUTPUT,
        "-3",
        "`tuning.rank` is -3; allowed: a whole number from 1 to 4096",
    ),
    Bad("infinite clip", BASE + "train: {max_grad_norm: .inf}\n", ".inf", "`train.max_grad_norm`", "for no clipping write null"),
    Bad("not a number", BASE + "optimizer: {epsilon: .nan}\n", ".nan", "`optimizer.epsilon`"),
    Bad(
        "misspelt value",
        BASE + "schedule: {method: cosin}\n",
        "cosin",
        "allowed: `cosine`, `linear` or `constant`",
        "did you mean `cosine`?",
    ),
    Bad(
        "another tool's value",
        BASE + "optimizer: {method: paged_adamw_8bit}\n",
        "paged_adamw_8bit",
        "allowed:",
        "did you mean|is called `paged-adamw-8bit`",
    ),
    Bad(
        "method that is a combination",
        MODEL + "tuning: {method: qlora}\n" + DATA + OUTPUT,
        "qlora",
        "`tuning.method`",
        "over `quantization: {method: nf4}`",
    ),
    Bad(
        "not yet: p-tuning",
        MODEL + "tuning: {method: p-tuning}\n" + DATA + OUTPUT,
        "p-tuning",
        "`tuning.method`",
        "`p-tuning` is not available in this version",
    ),
    Bad(
        "another tool's method",
        MODEL + "tuning: {method: prompt-tuning}\n" + DATA + OUTPUT,
        "prompt-tuning",
        "`tuning.method`",
        "`prompt-tuning` is called `prompt` here",
    ),
    Bad(
        "not yet: corda",
        MODEL + "tuning: {method: lora, init: {method: corda}}\n" + DATA + OUTPUT,
        "corda",
        "`tuning.init.method`",
        "is not available in this version",
    ),
    Bad("not yet: apollo", BASE + "optimizer: {method: apollo}\n", "apollo", "`optimizer.method`", "is not available in this version"),
    Bad(
        "optimizer as method",
        MODEL + "tuning: {method: galore}\n" + DATA + OUTPUT,
        "galore",
        "`tuning.method`",
        "`tuning: {method: full}` with `optimizer: {method: galore}`",
    ),
    Bad(
        "deepspeed",
        BASE + "distributed: {strategy: deepspeed}\n",
        "deepspeed",
        "`distributed.strategy`",
        "`fsdp` spreads the frozen weights",
    ),
    Bad(
        "a spread model of frozen nothing",
        MODEL + DATA + OUTPUT + "tuning: {method: full}\ndistributed: {strategy: fsdp}\n",
        "strategy: fsdp",
        "full tuning",
        "method: lora",
    ),
    Bad("8 bits spread", BASE + "quantization: {method: int8}\ndistributed: {strategy: fsdp}\n", "strategy: fsdp", "8-bit weights", "nf4"),
    Bad("nothing to offload", BASE + "distributed: {offload: true}\n", "offload", "`strategy` is auto", "strategy: fsdp"),
    Bad(
        "axolotl's tokens",
        BASE + "added_tokens: [a]\n",
        "added_tokens",
        "unknown key",
        "is `model.new_tokens:",
    ),
    Bad(
        "misspelt kind of targets",
        MODEL + "tuning: {method: lora, targets: {spektrum: 0.5}}\n" + DATA + OUTPUT,
        "spektrum",
        "unknown key `spektrum`",
        "did you mean `spectrum`?",
    ),
    Bad(
        "word for the spectrum",
        MODEL + "tuning: {method: lora, targets: spectrum}\n" + DATA + OUTPUT,
        "spectrum",
        "`tuning.targets` is",
        "write `targets: {spectrum: 0.5}`",
    ),
    Bad(
        "too large a share",
        MODEL + "tuning: {method: full, targets: {spectrum: 50}}\n" + DATA + OUTPUT,
        "50",
        "`tuning.targets.spectrum` is 50; allowed: a number above 0 and up to 1",
    ),
    Bad(
        "rank of a pattern",
        MODEL + "tuning: {method: lora, rank_pattern: {'layers[.]0': big}}\n" + DATA + OUTPUT,
        "big",
        "allowed: a whole number from 1 to 4096",
        "Another rank",
    ),
    Bad(
        "number for a pattern", MODEL + "tuning: {method: lora, rank_pattern: 8}\n" + DATA + OUTPUT, "8", "it must be a mapping", "[.]0[.]"
    ),
    Bad(
        "hub without a commit",
        MODEL + TUNING + "data: {train: [{source: 'hub:owner/name'}]}\n" + OUTPUT,
        "hub:",
        "`data.train.0.revision` is missing",
        "the 40 hexadecimal digits of a commit of the dataset",
    ),
    Bad(
        "hub with a branch",
        MODEL + TUNING + "data: {train: [{source: 'hub:owner/name', revision: main}]}\n" + OUTPUT,
        "main",
        "`data.train.0.revision`",
        "a branch or tag can move",
    ),
    Bad(
        "hub with a path",
        MODEL + TUNING + f"data: {{train: [{{source: 'hub:owner/name/train', revision: {'a' * 40}}}]}}\n" + OUTPUT,
        "hub:",
        "`data.train.0.source`",
        "its parts go under `subset` and `split`",
    ),
    Bad(
        "branch as revision",
        "model: {id: a/b, revision: main}\n" + TUNING + DATA + OUTPUT,
        "main",
        "`model.revision`",
        "a branch or tag can move",
    ),
    Bad(
        "number as chapter", MODEL + TUNING + "data: {train: [{source: 'builtin:icd10cm', chapters: [AB]}]}\n" + OUTPUT, "AB", "chapters.0"
    ),
    # --- overrides
    Bad("override without a value", BASE, "", "an override needs a key and a value", "-o tuning.rank=32", ("seed",)),
    Bad("override with nothing", BASE, "", "`seed` has no value", "seed=null", ("seed=",)),
    Bad("override of an unknown key", BASE, "", "unknown key `epoch` in `train`", "did you mean `epochs`?", ("train.epoch=3",)),
    Bad("override of a wrong type", BASE, "", '`tuning.rank` is the text "big"', "", ("tuning.rank=big",)),
    Bad("override twice", BASE, "", "`seed` is overridden twice", "keep one", ("seed=1", "seed=2")),
    Bad(
        "override that another undoes",
        BASE,
        "",
        "`tuning.rank` is undone by a later override",
        "remove one",
        ("tuning.rank=8", "tuning={method: full}"),
    ),
    Bad("override beyond a list", BASE, "", "`data.train` is a list with 1 entry", "override the whole list", ("data.train.1.weight=2",)),
    Bad("override inside a value", BASE, "", "`output` is a single value", "override `output` itself", ("output.name=x",)),
    Bad("override by number", BASE, "", "is not a list that the file states", "", ("evaluation.tasks.0.generate=false",)),
    Bad("override of extends", BASE, "", "`extends` cannot be overridden", "change it in the file", ("extends=style",)),
    Bad("override with a bad path", BASE, "", "is not a path of keys", "", ("tuning..rank=3",)),
    Bad("override with a tag", BASE, "", "YAML tags", "", ("seed=!!python/name:os.system",)),
]


def test_the_table_is_long_and_its_names_differ():
    assert len(TABLE) >= 60
    assert len({bad.name for bad in TABLE}) == len(TABLE)


@pytest.mark.parametrize("bad", TABLE, ids=lambda bad: bad.name)
def test_c8_a_bad_configuration_is_refused_where_it_is_wrong(bad: Bad, problems: Any, line_of: Any):
    found = [problem for problem in problems(bad.text, *bad.overrides) if bad.what in problem.what]
    assert found, [str(problem) for problem in problems(bad.text, *bad.overrides)]
    problem = found[0]
    assert any(fix in problem.fix for fix in bad.fix.split("|")), str(problem)
    if bad.overrides:
        assert "-o " in problem.where
    if bad.at:
        assert isinstance(bad.text, str)
        line = bad.text.split("\n")[line_of(problem) - 1]
        assert bad.at in line, str(problem)
        assert problem.excerpt.splitlines()[-1].endswith("^")


@pytest.mark.parametrize("bad", TABLE, ids=lambda bad: bad.name)
def test_an_excerpt_fits_a_terminal_of_80_columns(bad: Bad, problems: Any):
    for problem in problems(bad.text, *bad.overrides):
        assert all(len(line) <= 76 for line in problem.excerpt.splitlines())


def test_every_problem_is_reported_in_one_run(problems: Any):
    text = """\
model: {id: owner/name, revison: null}
quantization: nf4
tuning: {method: lora, rank: 0, lora_alpha: 16, init: {method: corda}}
data: {train: [{source: a.jsonl, weight: 0}], max_token: 3}
train: {epochs: "2", early_stopping: {}}
train: {epochs: "2", early_stopping: {}}
optimizer: {groups: {embeddings: {lr_ratio: 0.1}, mpl: {lr_ratio: 2}}}
hf_token: secret-of-mine
"""
    said = [problem.what for problem in problems(text, "seed=-1", "nonsense")]
    expected = [
        "`output` is missing",
        "unknown key `revison`",
        "`quantization` is the text",
        "`tuning.rank` is 0",
        "unknown key `lora_alpha`",
        "`tuning.init.method` is",
        "`data.train.0.weight` is 0",
        "unknown key `max_token`",
        "`train.epochs` is the text",
        "early stopping watches validation loss",
        "`train` is given twice",
        "the embeddings are frozen",
        "group `mpl` is not a role",
        "`hf_token` holds a secret",
        "`seed` is -1",
        "an override needs a key and a value",
    ]
    for what in expected:
        assert sum(what in sentence for sentence in said) == 1, (what, said)
    assert len(said) == len(expected), said


def test_problems_come_in_the_order_of_the_file(problems: Any, line_of: Any):
    lines = [line_of(problem) for problem in problems(BASE + "seed: -1\ntrain: {epochs: 0}\nextra: 1\n")]
    assert lines == sorted(lines) == [5, 6, 7]
