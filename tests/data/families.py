"""Five template families, each with a small byte-level tokenizer that carries its special tokens.

The templates in tests/data/templates are written in the shape of SmolLM2's, Llama 3's, Qwen's, Gemma's and Mistral's.
`python -m tests.data.families` writes the golden file anew; read its diff before it is committed.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from finetune.data.records import Conversation, Message

TEMPLATES = Path(__file__).parent / "templates"
GOLDEN = TEMPLATES / "golden.json"
TEXT = "A short question about the heart and the answer to it.\n\nuser assistant model system [INST] What is the name of this? It is"

SPECIAL: dict[str, dict[str, str]] = {  # bos, eos, and the other special tokens
    "smollm2": {"bos": "<|im_start|>", "eos": "<|im_end|>", "more": ""},
    "llama3": {"bos": "<|begin_of_text|>", "eos": "<|eot_id|>", "more": "<|start_header_id|> <|end_header_id|>"},
    "qwen": {"eos": "<|im_end|>", "more": "<|im_start|> <|endoftext|>"},
    "qwen-think": {"eos": "<|im_end|>", "more": "<|im_start|> <|endoftext|>"},
    "gemma": {"bos": "<bos>", "eos": "<eos>", "more": "<start_of_turn> <end_of_turn>"},
    "mistral": {"bos": "<s>", "eos": "</s>", "more": "[INST] [/INST]"},
}
FAMILIES = tuple(SPECIAL)
ADDED = {"qwen": ["<tool_call>", "</tool_call>"], "qwen-think": ["<think>", "</think>"]}  # added, but not special: content may hold them


@cache
def tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Trained on one sentence, always to the same merges."""
    special = SPECIAL[family]
    tokens = [special[name] for name in ("bos", "eos") if name in special] + special["more"].split()
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=360, special_tokens=tokens, initial_alphabet=sorted(alphabet), show_progress=False)
    )
    named = {f"{name}_token": special[name] for name in ("bos", "eos") if name in special}
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=special["eos"], **named)
    made.add_tokens(ADDED.get(family, []))
    made.chat_template = (TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8")
    return made


def as_dicts(messages: tuple[Message, ...]) -> list[dict[str, Any]]:
    """For `apply_chat_template`."""
    turns = []
    for message in messages:
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.tool_calls:
            turn["tool_calls"] = [dict(call) for call in message.tool_calls]
        turns.append(turn)
    return turns


def user(text: str) -> Message:
    """A question."""
    return Message("user", text)


def assistant(text: str, **more: Any) -> Message:
    """An answer."""
    return Message("assistant", text, **more)


CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"key": "heart"}}}
TOOL = {"type": "function", "function": {"name": "look_up", "description": "Finds it.", "parameters": {"type": "object"}}}
CASES: dict[str, Conversation] = {
    "single": Conversation((user("What is it?"), assistant("It is this.")), "single"),
    "several": Conversation((user("What?"), assistant("This."), user("And the name?"), assistant("Heart.")), "several"),
    "system": Conversation((Message("system", "Be short."), user("What?"), assistant("This.")), "system"),
    "unicode": Conversation((user("Où est le cœur ? 心臓"), assistant("Là — ❤️ 左")), "unicode"),
    "spaces": Conversation((user("  What?\n"), assistant("It is \n\n this. ")), "spaces"),
    "tools": Conversation(
        (user("What?"), assistant("", tool_calls=(CALL,)), Message("tool", "A muscle."), assistant("A muscle.")), "tools", (TOOL,)
    ),
}
REFUSED = {
    "smollm2": {"tools": "does not write the tool call"},
    "qwen-think": {"tools": "does not write the tool call"},
    "gemma": {"system": "no system role", "tools": "alternate"},
    "mistral": {"system": "differently", "tools": "alternate"},  # it writes a system message only into a last question
}


def render_all() -> dict[str, Any]:
    """Ids, and the pieces of text that carry loss, of every family and case."""
    from finetune.data.render import Renderer

    found: dict[str, Any] = {}
    for family in FAMILIES:
        renderer = Renderer(tokenizer(family))
        for name, record in CASES.items():
            if name in REFUSED.get(family, {}):
                continue
            example = renderer.example(record)
            text = renderer.tokenizer.decode(example.ids)
            mask = "".join("01"[on] for on in example.mask)
            found[f"{family} {name}"] = {"text": text, "learned": learned(renderer, example), "ids": list(example.ids), "mask": mask}
    return found


def learned(renderer: Any, example: Any) -> list[str]:
    """The supervised stretches of an example as text."""
    stretches: list[list[int]] = []
    for place, (token, on) in enumerate(zip(example.ids, example.mask, strict=True)):
        if on:
            if not example.mask[place - 1]:
                stretches.append([])
            stretches[-1].append(token)
    return [renderer.tokenizer.decode(stretch) for stretch in stretches]


if __name__ == "__main__":
    cases = [f" {json.dumps(name)}: {json.dumps(case, ensure_ascii=False)}" for name, case in render_all().items()]
    GOLDEN.write_text("{\n" + ",\n".join(cases) + "\n}\n", encoding="utf-8")
