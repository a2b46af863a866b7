"""New tokens: where they stand in the tokenizer, and which rows of the embedding (and of an untied head) they get.

**Ids.** The tokens of `model.new_tokens` are added behind the tokenizer's own, so that their ids are ``first, first + 1, ...`` with
``first`` = the length of the model's own tokenizer. They are ordinary text (`special=False`: they are found in user content and kept when
text is decoded) and are matched as written (`normalized=False`). The enlarged tokenizer is saved beside the adapter.

**Rows.** The embedding has a row for every id: it grows to ``first + n`` rows where it is shorter, and keeps its length where spare rows
exist. The rows ``first .. first + n - 1``, spare or appended, start as the mean of the rows ``0 .. first - 1``: the mean is formed in
fp64 of the weights *in the type the base is loaded in*, and rounded to that type, so that loading, reloading and merging agree to the
bit. A tied head is the same tensor; an untied head is enlarged by the same rule from its own rows. `enlarged` is that rule, for one
tensor; whoever rebuilds a weight from disk calls it.

**What an adapter stores** (`adapter_config.json` and the keys of `adapter_model.safetensors`, below `base_model.model.`):

- `embeddings: new-tokens`: `trainable_token_indices = {"model.embed_tokens": [ids]}`, and `"lm_head": [ids]` beside it where the head is
  not tied. The key `MODULE.token_adapter.trainable_tokens_delta` (n, d) holds, in spite of its name, the rows themselves: row i of it
  *replaces* row ids[i] of the enlarged weight. A tied head has no key of its own, follows the embedding, and stays tied when merged.
- `embeddings: full`, head tied: `modules_to_save = ["model.embed_tokens"]`, `ensure_weight_tying = true`. The file holds
  `model.embed_tokens.weight` and `lm_head.weight`, which are equal (they are one parameter while training); both have all rows, the new
  ones included. Merged, the pair stays tied: one tensor is written.
- `embeddings: full`, head untied: `model.embed_tokens.weight` whole; with new tokens `lm_head` is in `trainable_token_indices` as above.
- `embeddings: lora`: `model.embed_tokens.lora_embedding_A` (r, rows) with the new rows, B (d, r). The head, tied or not, is the base's
  (enlarged) weight *without* the update, so that merging unties the pair.

To merge: read the weight of the base, round it to the compute type, apply `enlarged(weight, ids)`, then replace rows or the whole, and
write `vocab_size` = rows into config.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AddedToken

from finetune.errors import ConfigError, Problem, VerificationError

_ROWS_AT_ONCE = 8192
"""Rows that are in fp64 at a time: a matrix of 128k rows would take gigabytes as a whole."""


def add_tokens(tokenizer: Any, tokens: Sequence[str]) -> tuple[int, ...]:
    """Add ``tokens`` to ``tokenizer`` in place; returns their ids. ConfigError where one exists already or is listed twice."""
    vocabulary = tokenizer.get_vocab()
    problems = [
        Problem(f"{token!r} is listed twice", "model.new_tokens", "keep one of the two")
        for index, token in enumerate(tokens)
        if token in tokens[:index]
    ]
    problems += [
        Problem(f"{token!r} is a token of the model already (id {vocabulary[token]})", "model.new_tokens", "remove it from the list")
        for token in tokens
        if token in vocabulary
    ]
    if problems:
        raise ConfigError.from_problems(problems)
    if tokens:
        tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in tokens])
    return token_ids(tokenizer, tokens)


def token_ids(tokenizer: Any, tokens: Sequence[str]) -> tuple[int, ...]:
    """Ids of ``tokens`` in a ``tokenizer`` that has them; VerificationError where it does not, or not as its last ones."""
    vocabulary = tokenizer.get_vocab()
    ids = tuple(vocabulary.get(token, -1) for token in tokens)
    if ids != tuple(range(len(tokenizer) - len(tokens), len(tokenizer))):
        raise VerificationError(
            f"the new tokens {', '.join(map(repr, tokens))} have the ids {ids}, which are not the last of {len(tokenizer)}",
            where="model.new_tokens",
            fix="use the tokenizer that the run saved",
        )
    return ids


def enlarged(weight: Tensor, ids: Sequence[int]) -> Tensor:
    """``weight`` (rows, d) of the base, in the type it is loaded in, with the rows of new ``ids`` as they start; see the module.

    Returns a new (max(rows, last id + 1), d) tensor of the same type and device, or ``weight`` itself where there are no ids.
    """
    if not ids:
        return weight
    first, needed = ids[0], ids[-1] + 1
    if weight.shape[0] < first:
        raise VerificationError(f"a weight of {weight.shape[0]} rows has none for the tokens below {first}", fix="check model.id")
    total = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    for start in range(0, first, _ROWS_AT_ONCE):
        total += weight[start : min(start + _ROWS_AT_ONCE, first)].double().sum(dim=0)
    result = weight.new_empty(max(weight.shape[0], needed), weight.shape[1])
    result[: weight.shape[0]] = weight
    result[first:needed] = (total / first).to(weight.dtype)
    return result


def is_tied(model: Any) -> bool:
    """Whether the output head of the base ``model`` is the embedding's own weight."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


@torch.no_grad()
def enlarge(model: Any, ids: Sequence[int]) -> None:
    """Give the base ``model``, fresh from `load_base`, rows for the new token ``ids``; a tied head stays tied.

    The model must not carry an adapter yet: call it before `adapters.attach` or `adapters.load`.
    """
    if not ids:
        return
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows = enlarged(embedding.weight, ids)
    head_rows = None if head is None or is_tied(model) else enlarged(head.weight, ids)
    frozen = not embedding.weight.requires_grad
    if rows.shape[0] > embedding.weight.shape[0]:
        # the resized rows are overwritten: transformers would draw them around the mean, anew at every loading
        model.resize_token_embeddings(rows.shape[0], mean_resizing=False)
    model.get_input_embeddings().weight.copy_(rows)
    if head_rows is not None:
        model.get_output_embeddings().weight.copy_(head_rows)
    if frozen:
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            if module is not None:
                module.requires_grad_(False)
