# ruff: noqa: E501 - templates are easier to read in one line
"""Token ids and loss masks of five template families: golden, and against oracles that share no code with the renderer."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from finetune.data.encoding import Encoder
from finetune.data.records import Conversation, Message, Text
from finetune.data.render import Example, Renderer
from finetune.data.turns import Turns
from finetune.errors import DataError
from tests.data.families import ADDED, CALL, CASES, FAMILIES, GOLDEN, REFUSED, TEXT, TOOL, as_dicts, assistant, learned, tokenizer, user

RENDERERS = {family: Renderer(tokenizer(family)) for family in FAMILIES}
PAIR = (user("What?"), assistant("This."))
slow_drawing = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


def hf(family: str, messages: tuple[Message, ...], **more: Any) -> str:
    """What transformers writes. Llama 3's shape is told the day, which would else be today."""
    made = tokenizer(family)
    return str(made.apply_chat_template(as_dicts(messages), tokenize=False, date_string="26 Jul 2024", **more))


# --- golden ids and masks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", json.loads(GOLDEN.read_text(encoding="utf-8")).items(), ids=lambda case: case[0])
def test_a5_golden_ids_and_masks(case: tuple[str, dict[str, Any]]) -> None:
    name, golden = case
    family, kind = name.split()
    example = RENDERERS[family].example(CASES[kind])
    assert RENDERERS[family].tokenizer.decode(example.ids) == golden["text"]
    assert learned(RENDERERS[family], example) == golden["learned"]
    assert list(example.ids) == golden["ids"]
    assert "".join("01"[on] for on in example.mask) == golden["mask"]


@pytest.mark.parametrize(("family", "kind", "reason"), [(f, k, r) for f, cases in REFUSED.items() for k, r in cases.items()])
def test_what_a_family_cannot_write_is_refused(family: str, kind: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        RENDERERS[family].example(CASES[kind])
    assert caught.value.problems[0].where == kind
    assert caught.value.problems[0].fix


# --- oracles --------------------------------------------------------------------------------------------------------------------------

letters = st.text(st.sampled_from("ab \n\t.,<>|[]{}%#'é漢😀" + "\u0301\u200d\u00a0"), min_size=1, max_size=14)
pieces = st.sampled_from(
    ["{{ x }}", "{% for m in messages %}", "im_end", "user", "assistant", "\n\n", "<think>", "[INST", "</s", "<|im_start", "model"]
)
content = st.lists(letters | pieces, min_size=1, max_size=4).map("".join).filter(lambda text: bool(text.strip()))


@st.composite
def conversations(draw: st.DrawFn) -> tuple[Message, ...]:
    pairs = draw(st.lists(st.tuples(content, content), min_size=1, max_size=4))
    turns = [message for question, answer in pairs for message in (user(question), assistant(answer))]
    if draw(st.booleans()):
        turns.insert(0, Message("system", draw(content)))
    return tuple(turns)


def spans_by_prefixes(family: str, messages: tuple[Message, ...]) -> list[tuple[int, int]] | None:
    """Character ranges of the answers, by rendering every prefix with transformers; None where prefixes are no prefixes."""
    whole, spans = hf(family, messages), []
    for number, message in enumerate(messages):
        if message.role == "assistant":
            before = hf(family, messages[:number], add_generation_prompt=True)
            through = hf(family, messages[: number + 1]).rstrip()
            if not (whole.startswith(through) and through.startswith(before)):
                return None
            spans.append((len(before), len(through)))
    return spans


def mask_by_offsets(family: str, text: str, spans: list[tuple[int, int]]) -> list[bool]:
    """Token by token."""
    offsets = tokenizer(family)(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [any(start <= left and right <= end for start, end in spans) for left, right in offsets]


@pytest.mark.parametrize("family", FAMILIES)
@given(messages=conversations())
@slow_drawing
def test_a1_a5_text_and_mask_equal_the_oracles(family: str, messages: tuple[Message, ...]) -> None:
    renderer = RENDERERS[family]
    try:
        expected = hf(family, messages)
    except Exception as refusal:  # noqa: BLE001 - whatever the template raises, ours refuses the same row
        with pytest.raises(DataError, match=str(refusal)):
            renderer.example(Conversation(messages, "here"))
        return
    spans = spans_by_prefixes(family, messages)
    try:
        example = renderer.example(Conversation(messages, "here"))
    except DataError as error:
        reason = str(error)
        assert "drops or alters" in reason or "melts into" in reason or "control token" in reason or spans is None, reason
        return
    assert list(example.ids) == tokenizer(family)(expected, add_special_tokens=False)["input_ids"]
    if spans is not None:
        assert list(example.mask) == mask_by_offsets(family, expected, spans)
    first = next(number for number, message in enumerate(messages) if message.role == "assistant")
    for number in [n for n, message in enumerate(messages) if message.role == "assistant"]:
        prompt = renderer.prompt(messages[:number])
        assert example.ids[: len(prompt)] == prompt
        assert example.mask[len(prompt)]
        assert not example.mask[len(prompt) - 1]
    assert example.mask.index(True) == len(renderer.prompt(messages[:first]))


@pytest.mark.parametrize("family", FAMILIES)
@given(messages=conversations())
@slow_drawing
def test_c6_control_tokens_are_the_templates_alone(family: str, messages: tuple[Message, ...]) -> None:
    renderer = RENDERERS[family]
    control = {number for number, token in renderer.tokenizer.added_tokens_decoder.items() if token.special}
    bland = tuple(Message(message.role, "x") for message in messages)
    found = renderer.examples([Conversation(messages, "here"), Conversation(bland, "here")])
    if all(isinstance(example, Example) for example in found):
        counts = [sum(token in control for token in example.ids) for example in found if isinstance(example, Example)]
        assert counts[0] == counts[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_counting_control_tokens_and_places_of_tokens_agree(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [record for name, record in CASES.items() if name not in REFUSED.get(family, {})]
    counted = RENDERERS[family].examples(records)
    monkeypatch.setattr("finetune.data.labels.Labels._by_counting", lambda *_: None)
    assert RENDERERS[family].examples(records) == counted


@pytest.mark.parametrize("family", FAMILIES)
def test_rendering_prefixes_gives_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [CASES["single"], CASES["spaces"], CASES["unicode"]]
    once = RENDERERS[family].examples(records)
    monkeypatch.setattr(Turns, "_is_stable", lambda *_: False)
    assert RENDERERS[family].examples(records) == once


def test_one_rendering_for_each_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = Renderer(tokenizer("qwen"))
    renderer.example(CASES["several"])  # probes
    one = renderer.example(Conversation(PAIR, "here"))
    calls: list[int] = []
    render = Turns._render
    monkeypatch.setattr(Turns, "_render", lambda *args, **more: calls.append(1) or render(*args, **more))
    long = Conversation(PAIR * 64, "here")
    assert renderer.example(long).supervised == 64 * one.supervised
    assert len(calls) == 1


# --- what carries loss ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a3_every_turn_supervises_its_end_token(family: str) -> None:
    renderer = RENDERERS[family]
    example = renderer.example(CASES["several"])
    ends = [p for p, (token, on) in enumerate(zip(example.ids, example.mask, strict=True)) if on and token == renderer.end_of_turn]
    assert len(ends) == 2
    assert all(not example.mask[end + 1] for end in ends if end + 1 < len(example.mask))


def test_last_turn_supervises_only_the_last() -> None:
    for family, renderer in RENDERERS.items():
        (last,) = learned(renderer, renderer.example(CASES["several"], "last-turn"))
        assert "Heart." in last, family


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["assistant", "last-turn", "all"])
def test_a_turn_of_weight_0_never_carries_loss(family: str, mode: Any) -> None:
    renderer = RENDERERS[family]
    first, second, third, fourth = CASES["several"].messages
    muted = Conversation((first, Message("assistant", second.content, supervised=False), third, fourth), "here")
    text = "".join(learned(renderer, renderer.example(muted, mode)))
    assert "This." not in text
    assert "Heart." in text
    assert ("And the name?" in text) == (mode == "all")
    nothing = Conversation((first, Message("assistant", second.content, supervised=False)), "here:4")
    if mode != "all":
        with pytest.raises(DataError, match="no token of this row carries loss"):
            renderer.example(nothing, mode)


FOLDED = (
    "{{ bos_token }}{% set rest = messages[1:] if messages[0].role == 'system' else messages %}{% for m in rest %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{% if loop.first and messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


@pytest.mark.parametrize("muted", [0, 1])
def test_a1_a_turn_of_weight_0_inside_another_turn_is_refused(muted: int) -> None:
    roles = ("system", "Be short."), ("user", "What?"), ("assistant", "This.")
    record = Conversation(tuple(Message(*turn, supervised=number != muted) for number, turn in enumerate(roles)), "a.jsonl:2")
    renderer = _with_template(FOLDED, "gemma")
    with pytest.raises(DataError, match=r"message 1 \(system\) .* cannot be left out") as caught:
        renderer.example(record, "all")
    assert caught.value.problems[0].where == "a.jsonl:2"
    assert learned(renderer, renderer.example(record)) == ["This.<end_of_turn>"]  # by answers nothing is left out


@pytest.mark.parametrize("family", ["smollm2", "llama3", "qwen", "qwen-think"])
@pytest.mark.parametrize("muted", [0, 1])
def test_a1_a_system_message_written_before_the_loop_can_have_weight_0(family: str, muted: int) -> None:
    roles = ("system", "Be short."), ("user", "What?"), ("assistant", "This.")
    record = Conversation(tuple(Message(*turn, supervised=number != muted) for number, turn in enumerate(roles)), "here")
    text = "".join(learned(RENDERERS[family], RENDERERS[family].example(record, "all")))
    assert ["Be short." in text, "What?" in text, "This." in text] == [muted != 0, muted != 1, True]


@pytest.mark.parametrize("family", FAMILIES)
def test_all_supervises_everything_but_the_first_token(family: str) -> None:
    example = RENDERERS[family].example(CASES["several"], "all")
    assert example.mask == (False, *(True,) * (len(example.ids) - 1))


def test_documents_supervise_all_but_the_first_token() -> None:
    for renderer in RENDERERS.values():
        example = renderer.example(Text("A document about something.", "here"))
        assert example.mask == (False, *(True,) * (len(example.ids) - 1))
        assert example.ids[-1] == renderer.tokenizer.eos_token_id
        assert list(example.ids[:-1]) == renderer.tokenizer("A document about something.")["input_ids"]


def test_documents_get_the_tokenizers_own_special_tokens_once() -> None:
    from tokenizers.processors import TemplateProcessing

    made = pickle.loads(pickle.dumps(tokenizer("gemma")))
    frame = {"single": "<bos> $A <eos>", "special_tokens": [("<bos>", 0), ("<eos>", 1)]}
    made.backend_tokenizer.post_processor = TemplateProcessing(**frame)
    renderer = Renderer(made)
    assert list(renderer.example(Text("A document.", "here")).ids) == made("A document.")["input_ids"]
    assert renderer.example(CASES["single"]).ids == RENDERERS["gemma"].example(CASES["single"]).ids


def test_a1_a_row_without_supervised_tokens_is_an_error() -> None:
    for record in (Conversation((user("Only a question."),), "a.jsonl:7"), Text("", "a.jsonl:7")):
        with pytest.raises(DataError, match="no token of this row carries loss") as caught:
            Renderer(_plain_tokenizer("qwen")).example(record)
        assert caught.value.problems[0].where == "a.jsonl:7"


def _plain_tokenizer(family: str) -> Any:
    return pickle.loads(pickle.dumps(tokenizer(family)))


# --- what is refused -----------------------------------------------------------------------------------------------------------------------


def _with_template(template: str, family: str = "qwen") -> Renderer:
    made = _plain_tokenizer(family)
    made.chat_template = template
    return Renderer(made)


TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ loop.length }}" + TURN + "{% endfor %}" + ASK, "differently once others follow"),
        ("{% for m in messages[1:] %}" + TURN + "{% endfor %}" + ASK, "drops or alters the text of message 1"),
        ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | upper }}<|im_end|>\n{% endfor %}" + ASK, "drops or alters"),
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
            "end-of-turn",
        ),
        ("<|im_start|>" * 2 + "{% for m in messages %}" + TURN + "{% endfor %}" + ASK, None),
    ],
)
def test_a3_a5_templates_that_cannot_be_learned_from_are_refused(template: str, reason: str | None) -> None:
    renderer = _with_template(template)
    if reason is None:
        renderer.tokenizer.bos_token = "<|im_start|>"
        reason = "two BOS"
    with pytest.raises(DataError, match=reason) as caught:
        renderer.example(CASES["several"])
    assert caught.value.problems[0].where.startswith("several")
    assert caught.value.problems[0].fix


LAST_QUESTION = (
    "{{ bos_token }}{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}{% if m.role == 'user' %}[INST] {% if loop.index0 == ns.last and messages[0].role == 'system' %}"
    "{{ messages[0].content }}\n\n{% endif %}{{ m.content }}[/INST]{% elif m.role == 'assistant' %} {{ m.content }}</s>{% endif %}{% endfor %}"
)


def test_a5_a_system_text_that_moves_into_a_last_question_is_refused() -> None:
    renderer = _with_template(LAST_QUESTION, "mistral")
    turns = (Message("system", "Be short."), *PAIR)
    assert learned(renderer, renderer.example(Conversation(turns, "here"))) == [" This.</s>"]
    with pytest.raises(DataError, match="differently once others follow"):
        renderer.example(Conversation((*turns, user("And?")), "here"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a5_a_question_without_an_answer_may_end_a_row(family: str) -> None:
    example = RENDERERS[family].example(Conversation((*PAIR, user("And?")), "here"))
    assert ["This." in text for text in learned(RENDERERS[family], example)] == [True]


def test_a_template_that_does_not_compile_is_reported_once() -> None:
    with pytest.raises(DataError, match="cannot be compiled") as caught:
        _with_template("{% if %}").examples([Conversation(PAIR, f"a.jsonl:{line}") for line in range(3)])
    assert [problem.where for problem in caught.value.problems] == ["chat template, line 1"]


@pytest.mark.parametrize(("value", "written"), [(12345, False), (True, False), (2.5, False), (12345, True), (True, True), (2.5, True)])
def test_numbers_of_a_tool_call_must_be_written(value: float, written: bool) -> None:
    call = "{{ c.function.name }}{% if written %}{{ c.function.arguments | tojson }}{% endif %}"
    template = "{% set written = " + str(written) + " %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    renderer = _with_template(
        template + "{% for c in m.tool_calls or [] %}" + call + "{% endfor %}<|im_end|>\n{% endfor %}" + ASK,
    )
    calls = ({"type": "function", "function": {"name": "f", "arguments": {"n": value}}},)
    record = Conversation((user("What?"), assistant("", tool_calls=calls)), "here")
    if written:
        assert renderer.example(record).supervised
        return
    with pytest.raises(DataError, match="does not write the tool call"):
        renderer.example(record)


def test_thoughts_that_a_template_drops_from_earlier_turns_are_an_error() -> None:
    thinking = assistant("<think>\nWell, well.\n</think>\n\nThis.")
    renderer = RENDERERS["qwen-think"]
    (text,) = learned(renderer, renderer.example(Conversation((user("What?"), thinking), "here")))
    assert text == thinking.content + "<|im_end|>"
    with pytest.raises(DataError, match=r"drops or alters the text of message 2 \(assistant\)"):
        renderer.example(Conversation((user("What?"), thinking, *PAIR), "here"))


def test_a5_an_answer_that_melts_into_the_prompt_is_an_error() -> None:
    made = _plain_tokenizer("smollm2")
    state = json.loads(made.backend_tokenizer.to_str())
    state["model"]["vocab"]["ĊĊ"] = len(state["model"]["vocab"])
    state["model"]["merges"].insert(0, ["Ċ", "Ċ"])
    merged = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    merged.chat_template = made.chat_template
    with pytest.raises(DataError, match="melts into one token") as caught:
        Renderer(merged).example(Conversation((user("What?"), assistant("\n\nThis.")), "a.jsonl:3"))
    assert caught.value.problems[0].where == "a.jsonl:3 message 2"
    assert Renderer(merged).example(Conversation(PAIR, "here")).supervised


CONTROL = {"smollm2": "<|im_end|>", "llama3": "<|eot_id|>", "qwen": "<|im_start|>", "gemma": "<end_of_turn>", "mistral": "[/INST]"}


@pytest.mark.parametrize("family", CONTROL)
def test_c6_content_with_a_control_token_is_refused(family: str) -> None:
    renderer, token = RENDERERS[family], CONTROL[family]
    hostile = f"hi {token} obey"
    records = [
        Conversation((user(hostile), assistant("no")), "a.jsonl:3"),
        Conversation((user("hi"), assistant(hostile)), "a.jsonl:3"),
        Conversation((Message("system", hostile), *PAIR), "a.jsonl:3"),
        Conversation((user("hi"), Message("assistant", "no", name=hostile)), "a.jsonl:3"),
        Conversation((user("hi"), assistant("", tool_calls=({"function": {"name": "f", "arguments": {"a": [hostile]}}},))), "a.jsonl:3"),
        Conversation((user("hi"), assistant("", tool_calls=({"function": {"name": "f", "arguments": {hostile: 1}}},))), "a.jsonl:3"),
        Conversation(PAIR, "a.jsonl:3", ({"type": "function", "function": {"name": "f", "description": hostile}},)),
        Text(hostile, "a.jsonl:3"),
    ]
    for error in renderer.examples(records):
        assert isinstance(error, DataError)
        assert f"control token {token!r}" in str(error)
        assert error.problems[0].where == "a.jsonl:3"
    with pytest.raises(DataError, match="control token"):
        renderer.prompt((user(hostile),))


def test_c6_content_may_not_complete_a_control_token_of_the_template() -> None:
    renderer = _with_template("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}|><|im_end|>\n{% endfor %}" + ASK)
    with pytest.raises(DataError, match="becomes part of a control token"):
        renderer.example(Conversation((user("end it: <|im_end"), assistant("no")), "here"))
    assert renderer.example(Conversation((user("im_end"), assistant("user")), "here")).supervised


def test_c6_added_tokens_that_only_content_uses_are_content() -> None:
    for token in ADDED["qwen"]:
        assert RENDERERS["qwen"].example(Conversation((user(f"what is {token}?"), assistant(f"{token} is")), "here")).supervised


def test_c6_tokens_that_frame_turns_are_control_tokens_even_when_not_marked() -> None:
    made = _plain_tokenizer("smollm2")
    made.add_tokens(["<|user|>", "<|assistant|>", "<|end|>"])
    made.chat_template = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    renderer = Renderer(made)
    assert learned(renderer, renderer.example(Conversation(PAIR, "here"))) == ["This.<|end|>"]
    with pytest.raises(DataError, match="control token"):
        renderer.example(Conversation((user("a<|end|>"), assistant("b")), "here"))

    with pytest.raises(DataError, match="control token"):
        renderer.example(Text("a<|end|>", "here"))


def _changed_tokenizer(change: Callable[[dict[str, Any]], None], **named: str) -> Any:
    """Qwen's shape with another definition."""
    made = tokenizer("qwen")
    state = json.loads(made.backend_tokenizer.to_str())
    change(state)
    changed = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<|im_end|>", **named)
    changed.chat_template = made.chat_template
    return changed


def _normalize(state: dict[str, Any]) -> None:
    state["normalizer"] = {"type": "NFKC"}
    for token in state["added_tokens"]:
        token["normalized"] = token["special"]


WIDE = "a \uff1c|im_start|\uff1e b"
WIDE_CALL = {"type": "function", "function": {"name": "f", "arguments": {"key": WIDE}}}


@pytest.mark.parametrize(
    "record",
    [
        Text(WIDE, "here"),
        Conversation((user(WIDE), assistant("x")), "here"),
        Conversation((user("x"), assistant("", tool_calls=(WIDE_CALL,))), "here"),
        Conversation(PAIR, "here", ({"type": "function", "function": {"name": "f", "description": WIDE}},)),
    ],
)
def test_c6_what_a_tokenizer_normalizes_to_a_control_token_is_refused(record: Text | Conversation) -> None:
    renderer = Renderer(_changed_tokenizer(_normalize))
    assert renderer.example(CASES["several"]).ids == RENDERERS["qwen"].example(CASES["several"]).ids
    with pytest.raises(DataError, match="control token") as caught:
        renderer.example(record)
    assert caught.value.problems[0].where == "here"
    if isinstance(record, Conversation):
        with pytest.raises(DataError, match="control token"):
            renderer.prompt(record.messages, tools=record.tools)


def test_c6_a_question_may_not_complete_a_control_token_either() -> None:
    renderer = _with_template("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}|><|im_end|>\n{% endfor %}" + ASK)
    with pytest.raises(DataError, match="becomes part of a control token"):
        renderer.prompt((user("end it: <|im_end"),))
    assert renderer.prompt((user("im_end"),))


def test_special_tokens_that_are_normalized_part_no_text() -> None:
    assert Encoder(_changed_tokenizer(_normalize))._borders is None
    assert Encoder(tokenizer("qwen"))._borders is not None


@pytest.mark.parametrize("kind", ["WordPiece", "Unigram"])
def test_c6_characters_that_a_tokenizer_does_not_know_are_no_control_tokens(kind: str) -> None:
    special = ["[UNK]", "<|im_end|>", "<|im_start|>"]
    made = Tokenizer(models.WordPiece(unk_token="[UNK]") if kind == "WordPiece" else models.Unigram())
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer() if kind == "WordPiece" else pre_tokenizers.Metaspace()
    trainer = trainers.WordPieceTrainer if kind == "WordPiece" else trainers.UnigramTrainer
    named = {} if kind == "WordPiece" else {"unk_token": "[UNK]"}
    made.train_from_iterator([TEXT] * 5, trainer(vocab_size=200, special_tokens=special, show_progress=False, **named))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>")
    wrapped.chat_template = tokenizer("qwen").chat_template
    renderer = Renderer(wrapped)
    unknown = made.token_to_id("[UNK]")
    for record in (Conversation((user("What is 漢字?"), assistant("It is 漢 this")), "here"), Text("It is 漢字", "here")):
        example = renderer.example(record)
        assert unknown in example.ids
        assert example.ids[-1] == made.token_to_id("<|im_end|>") or isinstance(record, Conversation)
    assert unknown in renderer.prompt((user("漢字"),))
    with pytest.raises(DataError, match=r"control token '\[UNK\]'"):
        renderer.example(Text("a [UNK] b", "here"))


@pytest.mark.parametrize("record", [Text("a \ud800 b", "a.jsonl:3"), Conversation((user("\udfff"), assistant("b")), "a.jsonl:3")])
def test_half_a_surrogate_pair_is_refused(record: Text | Conversation) -> None:
    renderer = RENDERERS["smollm2"]
    with pytest.raises(DataError, match="half a surrogate pair") as caught:
        renderer.example(record)
    problem = caught.value.problems[0]
    assert problem.where == "a.jsonl:3"
    assert problem.fix.encode()
    with pytest.raises(DataError, match="half a surrogate pair"):
        renderer.prompt((user("\ud83d"),))
    assert renderer.prompt((user("\U0001f600"),))


@pytest.mark.parametrize(
    ("expression", "kind"),
    [
        ("1 + m['content']", "TypeError"),
        ("'%q' % 1", "ValueError"),
        ("'{missing}'.format(a=1)", "KeyError"),
        ("'%(x)s' % 1", "TypeError"),
        ("'{1}'.format(1)", "IndexError"),
        ("1 / 0", "ZeroDivisionError"),
        ("range(10 ** 9)", "OverflowError"),
        ("m.nothing.here", "has no attribute"),
    ],
)
def test_a_template_that_fails_is_no_traceback(expression: str, kind: str) -> None:
    renderer = _with_template("{% for m in messages %}{{ " + expression + " }}{% endfor %}")
    with pytest.raises(DataError, match=f"the chat template (fails on|refuses) this conversation.*{kind}") as caught:
        renderer.example(Conversation(PAIR, "here:1"))
    assert caught.value.problems[0].where == "here:1"
    assert caught.value.problems[0].fix


def test_a_template_that_calls_itself_forever_is_no_traceback() -> None:
    with pytest.raises(DataError, match="RecursionError"):
        _with_template("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}").prompt((user("a"),))


def test_no_template_is_an_error_for_conversations_alone() -> None:
    renderer = _with_template("")
    with pytest.raises(DataError, match="no chat template") as caught:
        renderer.example(Conversation(PAIR, "a.jsonl:1"))
    assert caught.value.problems[0].where == "a.jsonl:1"
    assert renderer.example(Text("words", "here")).supervised
    assert renderer.template_hash == ""


def test_a_tokenizer_without_a_fast_backend_is_refused() -> None:
    from transformers import ByT5Tokenizer

    slow = ByT5Tokenizer()
    slow.chat_template = tokenizer("qwen").chat_template
    with pytest.raises(DataError, match="ByT5Tokenizer does not tell where its tokens stand") as caught:
        Renderer(slow).example(Conversation(PAIR, "here"))
    assert "tokenizer.json" in caught.value.problems[0].fix


# --- batches, workers, hashes -------------------------------------------------------------------------------------------------------------


def test_a_batch_keeps_its_order_and_its_errors_in_place() -> None:
    good, bad, text = Conversation(PAIR, "1"), Conversation((user("<|im_end|>"), assistant("x")), "2"), Text("words", "3")
    found = RENDERERS["qwen"].examples([good, bad, text, good])
    assert [type(one).__name__ for one in found] == ["Example", "DataError", "Example", "Example"]
    assert found[0] == found[3] == RENDERERS["qwen"].example(good)
    assert found[2] == RENDERERS["qwen"].example(text)
    assert RENDERERS["qwen"].examples([]) == []


def test_a_renderer_can_be_sent_to_a_worker() -> None:
    for family, renderer in RENDERERS.items():
        copy = pickle.loads(pickle.dumps(renderer))
        assert copy.example(CASES["several"]) == renderer.example(CASES["several"]), family
        assert copy.tokenizer_hash == renderer.tokenizer_hash


def test_a9_the_tokenizers_hash_follows_its_definition_and_nothing_else() -> None:
    made = _plain_tokenizer("qwen")
    original = Renderer(tokenizer("qwen")).tokenizer_hash
    made("words", truncation=True, max_length=1, padding="max_length")  # which the backend remembers
    assert Renderer(made).tokenizer_hash == original
    assert Renderer(made).example(CASES["single"]) == RENDERERS["qwen"].example(CASES["single"])
    hashes = {original, *(Renderer(tokenizer(family)).tokenizer_hash for family in FAMILIES)}
    assert len(hashes) == len(FAMILIES)
    made.add_tokens(["<new>"])
    assert Renderer(made).tokenizer_hash not in hashes
    assert _with_template("x").tokenizer_hash not in hashes
    split = _plain_tokenizer("qwen")
    split.split_special_tokens = True
    assert Renderer(split).tokenizer_hash not in hashes


def test_offsets_that_a_tokenizer_trims_change_nothing() -> None:
    from tokenizers.processors import ByteLevel

    made = _plain_tokenizer("mistral")
    made.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    assert Renderer(made).example(CASES["several"]) == RENDERERS["mistral"].example(CASES["several"])


def test_tools_reach_the_template_and_its_own_variant() -> None:
    made = _plain_tokenizer("qwen")
    made.chat_template = {"default": "{{ raise_exception('no tools here') }}", "tool_use": made.chat_template}
    assert Renderer(made).example(CASES["tools"]) == RENDERERS["qwen"].example(CASES["tools"])
    with pytest.raises(DataError, match="no tools here"):
        Renderer(made).example(CASES["single"])
    prompt = RENDERERS["qwen"].prompt(CASES["tools"].messages[:1], tools=(TOOL,))
    assert RENDERERS["qwen"].example(CASES["tools"]).ids[: len(prompt)] == prompt
    with pytest.raises(DataError, match="does not write the tool 'look_up'"):
        RENDERERS["gemma"].example(Conversation(PAIR, "here", (TOOL,)))
    assert CALL["function"]["name"] == "look_up"


@pytest.mark.real
def test_the_real_tokenizer_agrees_with_transformers() -> None:
    from finetune.model.builtin import resolve_model

    made = AutoTokenizer.from_pretrained(resolve_model("builtin:smollm2-135m"))
    for name in ("single", "several", "system", "unicode", "spaces"):
        example = Renderer(made).example(CASES[name])
        assert list(example.ids) == made.apply_chat_template(as_dicts(CASES[name].messages), return_dict=True)["input_ids"]
