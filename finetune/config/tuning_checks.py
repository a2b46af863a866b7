"""Checks of the tuning method with itself, with the base's quantization and with the tokens that are added."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from finetune.config.finding import Finding
from finetune.config.group_checks import bad_pattern
from finetune.config.methods import INITS_OF_PLAIN_BASES, facts, targets_of
from finetune.config.schema import (
    AdaLora,
    Config,
    EightBit,
    Full,
    Lora,
    NoQuantization,
    OloraInit,
    OrthogonalInit,
    PissaInit,
    Prefix,
    RegexTargets,
    SpectrumTargets,
    Tuning,
)
from finetune.config.tree import KeyPath

_EMBEDDINGS = "remove it, and set `tuning.embeddings: lora`"
_KEYWORD = "write the keyword without a list: `targets: {}`"
_NOT_TARGETS = {
    **dict.fromkeys(("embed_tokens", "wte", "word_embeddings"), _EMBEDDINGS),
    **{word: _KEYWORD.format(word) for word in ("attention", "mlp", "all-linear")},
    "spectrum": "write `targets: {spectrum: 0.5}`",
    "lm_head": "remove it: the output head stays frozen under LoRA in this version",
}


def quantization(config: Config) -> Iterator[Finding]:
    """Methods that would have to train quantized weights."""
    known, method = facts(config.tuning), config.quantization.method
    if isinstance(config.quantization, NoQuantization) or method in known.quantized:
        return
    yield Finding(
        f"`tuning.method: {config.tuning.method}` {known.why_not_quantized}, and {method} weights cannot be trained",
        "set `tuning: {method: lora}`, or `quantization: {method: none}`",
        ("tuning", "method"),
        ("quantization", "method"),
    )


def starts(config: Config) -> Iterator[Finding]:
    """Starts of LoRA that need another base, or that its other keys exclude."""
    tuning = config.tuning
    if not isinstance(tuning, Lora):
        return
    method, path = tuning.init.method, ("tuning", "init", "method")
    plain = isinstance(config.quantization, NoQuantization)
    if method == "loftq" and plain:
        what = "`tuning.init` is LoftQ, which corrects the error of a quantized base, and the base is not quantized"
        yield Finding(what, "set `quantization: {method: nf4}`, or remove `tuning.init`", path, ("quantization", "method"))
    if method in INITS_OF_PLAIN_BASES and not plain:
        what = f"`tuning.init: {method}` {INITS_OF_PLAIN_BASES[method]}, and the base is {config.quantization.method}"
        yield Finding(what, "set `init: {method: loftq}`, or `quantization: {method: none}`", path, ("quantization", "method"))
    if isinstance(tuning.init, PissaInit | OloraInit) and tuning.dora:
        what = f"`tuning.init: {method}` changes the base, and DoRA takes its magnitudes from it: they do not compose"
        yield Finding(what, "remove `dora`, or choose another `init`", path, ("tuning", "dora"))
    if isinstance(tuning.init, OrthogonalInit):
        yield from _odd_ranks(tuning)


def _odd_ranks(tuning: Lora) -> Iterator[Finding]:
    ranks: list[tuple[KeyPath, str, int]] = [(("tuning", "rank"), "rank", tuning.rank)]
    ranks += [(("tuning", "rank_pattern", pattern), f"'{pattern}'", rank) for pattern, rank in tuning.rank_pattern.items()]
    for path, key, rank in ranks:
        if rank % 2:
            what = f"orthogonal initialization halves the rank, and {rank} is odd"
            yield Finding(what, f"set `{key}: {rank + 1}`", path, ("tuning", "init", "method"))


def patterns(config: Config) -> Iterator[Finding]:
    """Regular expressions over module names that do not compile."""
    tuning = config.tuning
    targets = targets_of(tuning)
    if isinstance(targets, RegexTargets):
        yield from bad_pattern(targets.regex, "`tuning.targets.regex`", ("tuning", "targets", "regex"))
    if isinstance(tuning, Lora):
        for key, stated in (("rank_pattern", tuning.rank_pattern), ("alpha_pattern", tuning.alpha_pattern)):
            for pattern in stated:
                yield from bad_pattern(pattern, f"the key `{pattern}` of `tuning.{key}`", ("tuning", key, pattern))


def targets(config: Config) -> Iterator[Finding]:
    """Adapters cannot go to what is not a hidden linear layer."""
    wanted = targets_of(config.tuning)
    for index, name in enumerate(wanted if isinstance(wanted, tuple) else ()):
        if name in _NOT_TARGETS:
            yield Finding(f"no adapter can go to `{name}`", _NOT_TARGETS[name], ("tuning", "targets", index))


def adalora(config: Config) -> Iterator[Finding]:
    """Ranks that would have to grow, and prunings for which no step is left."""
    tuning = config.tuning
    if not isinstance(tuning, AdaLora):
        return
    if tuning.init_rank is not None and tuning.init_rank <= tuning.rank:
        what = f"AdaLoRA prunes from `init_rank` down to `rank`, and {tuning.init_rank} is not above {tuning.rank}"
        yield Finding(what, "remove `init_rank`: it is one and a half times `rank`", ("tuning", "init_rank"), ("tuning", "rank"))
    if tuning.warmup_ratio + tuning.final_ratio >= 1:
        what = f"no step is left for pruning: `warmup_ratio` and `final_ratio` sum to {tuning.warmup_ratio + tuning.final_ratio:g}"
        fix = "lower one of them: 0.1 and 0.3 are usual"
        yield Finding(what, fix, ("tuning", "final_ratio"), ("tuning", "warmup_ratio"))


def trainable_types(config: Config) -> Iterator[Finding]:
    """Trainable weights in bf16 whose method needs bf16 products."""
    if config.train.precision == "fp32" and (why := needs_bf16(config)):
        fix = "set `trainable_dtype: fp32`, or `precision: bf16`"
        yield Finding(
            f"`train.trainable_dtype: bf16` needs `precision: bf16` here: {why}", fix, ("train", "precision"), ("tuning", "method")
        )


def needs_bf16(config: Config) -> str | None:
    """Why a run with bf16 trainable weights cannot compute in fp32; None where it can. `precision: auto` is known on the device alone."""
    if config.train.trainable_dtype != "bf16":
        return None
    match config.tuning:
        case Full(targets=SpectrumTargets()):
            return "the weights that Spectrum chose would be bf16 between fp32 ones, and no product takes both"
        case AdaLora() if isinstance(config.quantization, EightBit):
            return "AdaLoRA on an int8 base multiplies its factors by the layer's input, and no product takes both types"
    return None


def prefix(config: Config) -> Iterator[Finding]:
    """Keys and values that are handed to each layer, which a layer that is computed again would not get."""
    if isinstance(config.tuning, Prefix) and config.train.gradient_checkpointing in (True, "offload"):
        what = "prefix tuning hands keys and values to each layer, which gradient checkpointing would lose"
        fix = "set `gradient_checkpointing: false` (or `auto`), or `tuning: {method: prompt}`"
        yield Finding(what, fix, ("train", "gradient_checkpointing"), ("tuning", "method"))


# --- tokens that are added -----------------------------------------------------------------------------------------------------------


def new_tokens(config: Config) -> Iterator[Finding]:
    """Added tokens that nothing trains, and rows that are to train where none is added."""
    tuning, tokens, path = config.tuning, config.model.new_tokens, ("model", "new_tokens")
    for token, times in Counter(tokens).items():
        if times > 1:
            yield Finding(f"`{token}` is added twice", "keep one of the two", path)
    if isinstance(tuning, Lora) and tuning.embeddings == "new-tokens" and not tokens:
        what = "`tuning.embeddings: new-tokens` trains the rows of `model.new_tokens`, and there are none"
        yield Finding(what, "add `new_tokens: [<note>]` to `model`, or remove `embeddings`", ("tuning", "embeddings"), path)
    if tokens and (problem := _untrained(tuning)):
        why, fix, culprit = problem
        yield Finding(f"`model.new_tokens` adds tokens whose embeddings would never train: {why}", fix, path, culprit)


def _untrained(tuning: Tuning) -> tuple[str, str, KeyPath] | None:
    match tuning:
        case Lora(embeddings="new-tokens" | "full") | Full(targets="all"):
            return None
        case Lora():
            why = "they are frozen" if tuning.embeddings == "frozen" else "a low-rank update cannot write new rows"
            return why, "set `tuning.embeddings: new-tokens` (or `full`)", ("tuning", "embeddings")
        case Full():
            return "`tuning.targets` chooses linear weights of the layers alone", "set `tuning.targets: all`", ("tuning", "targets")
    fix = "set `tuning: {method: lora, embeddings: new-tokens}`, or remove them"
    return f"`{tuning.method}` cannot train them", fix, ("tuning", "method")
