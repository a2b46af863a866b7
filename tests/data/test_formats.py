"""Rows as conversations and texts: every format, its optional columns, and what is refused."""

from __future__ import annotations

import pickle

import pytest

from finetune.data.formats import Conversation, Message, Record, Text, parse
from finetune.data.sources import Row
from finetune.errors import DataError

PAIR = (Message("user", "q"), Message("assistant", "a"))
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Berlin"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def parsed(values: dict[str, object], format_name: str = "auto", **columns: str) -> Record:
    return parse(Row(values, "x:1"), format_name, columns)


def messages(values: dict[str, object], format_name: str = "auto", **columns: str) -> tuple[Message, ...]:
    record = parsed(values, format_name, **columns)
    assert isinstance(record, Conversation)
    return record.messages


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {
            "messages": [
                {"role": "user", "content": "q", "weight": None, "name": None},
                {"role": "assistant", "content": "a", "tool_calls": []},
            ]
        },
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, {"role": "assistant", "content": "a"}], "id": 7},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversations": [{"from": "user", "value": "q", "weight": 1}, {"from": "assistant", "value": "a"}]},
        {"prompt": "q", "completion": "a"},
        {"question": "q", "answer": "a", "system": " "},
        {"question": "q", "answer": "a", "text": None},
        {"instruction": "q", "input": "", "output": "a"},
        {"instruction": "q", "input": None, "output": "a", "history": []},
    ],
)
def test_formats_are_recognized(row: dict[str, object]) -> None:
    assert messages(row) == PAIR


def test_alpaca_joins_instruction_and_input() -> None:
    row: dict[str, object] = {"instruction": "Translate.", "input": "Haus", "output": "house", "system": "Be brief."}
    assert messages(row) == (Message("system", "Be brief."), Message("user", "Translate.\n\nHaus"), Message("assistant", "house"))


@pytest.mark.parametrize(
    "row", [{"question": "q", "answer": "a"}, {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}]
)
def test_a_system_column_goes_first(row: dict[str, object]) -> None:
    assert messages(row | {"system": "s"}) == (Message("system", "s"), *PAIR)


def test_weights_say_what_is_learned() -> None:
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "weight": 0},
        {"role": "assistant", "content": "b", "weight": 1},
    ]
    assert [message.supervised for message in messages({"messages": turns})] == [True, False, True]
    speakers = [{"from": "gpt", "value": "a", "weight": 0}, {"from": "gpt", "value": "b"}]
    assert [message.supervised for message in messages({"conversations": speakers})] == [False, True]


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        CALL["function"],
        {"function": {"name": "weather", "arguments": '{"city": "Berlin"}'}, "type": None},
    ],
)
def test_tool_calls_have_one_shape(call: dict[str, object]) -> None:
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "rain", "tool_call_id": "1", "name": "weather"},
        {"role": "assistant", "content": "It rains."},
    ]
    record = parsed({"messages": turns, "tools": [TOOL]})
    assert isinstance(record, Conversation)
    assert record.tools == (TOOL,)
    assert record.messages[1] == Message("assistant", "", (CALL,))
    assert record.messages[2] == Message("tool", "rain", (), "weather", "1")
    assert pickle.loads(pickle.dumps(record)) == record


def test_tools_may_be_json_in_a_string() -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    record = parsed({"messages": turns, "tools": '[{"name": "weather"}]'})
    assert isinstance(record, Conversation)
    assert record.tools == ({"name": "weather"},)
    identified = {**CALL, "id": "call-1"}
    calls = messages({"messages": [{"role": "assistant", "tool_calls": [identified]}]})[0].tool_calls
    assert calls == (identified,)


def test_columns_are_mapped() -> None:
    assert messages({"Frage": "q", "Antwort": "a", "Nr": 3}, question="Frage", answer="Antwort") == PAIR
    assert messages({"Frage": "q", "answer": "a"}, "question-answer", question="Frage") == PAIR
    assert messages({"question": "not this", "Frage": "q", "answer": "a"}, question="Frage") == PAIR
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert messages({"conversations": turns}, "chat", messages="conversations") == PAIR
    assert messages({"prompt": "q", "question": "x", "completion": "a"}, question="prompt", answer="completion") == PAIR
    assert parsed({"body": "t"}, text="body") == Text("t", "x:1")


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"messages": []}, "at least one message"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "unknown role 'bot'"),
        ({"messages": [{"role": "user", "content": "x"}]}, "nothing to learn"),
        ({"messages": [{"role": "assistant", "content": " "}]}, "is empty"),
        ({"messages": [{"role": "assistant", "content": None}]}, "must be text"),
        ({"messages": [{"role": "assistant", "content": "x", "wieght": 0}]}, "unknown key 'wieght'"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown role"),
        ({"messages": [{"role": "user", "content": [3]}, {"role": "assistant", "content": "a"}]}, "'content' has a part that is not"),
        ({"messages": [{"role": "tool", "content": "x", "name": ""}, {"role": "assistant", "content": "a"}]}, "'name' must be text"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": "weather"}]}, "'tool_calls' must be a list"),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"type": "retrieval", "function": CALL}]}]},
            "of type 'retrieval'",
        ),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": ["weather"]}]}, "a tool call must be an object"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"name": "f", "args": {}}]}]}, "unknown key 'args'"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"name": "f", "arguments": [1]}]}]}, "must be an object"),
        ({"messages": [{"role": "assistant", "content": "x"}], "tools": {"name": "f"}}, "'tools' must be a list"),
        ({"conversations": [{"from": None, "value": "x"}]}, "unknown speaker None"),
        ({"question": "x", "answer": ""}, "'answer' is empty"),
        ({"question": "x", "reply": "y"}, "no known format"),
        ({"text": 3}, "must be text"),
        ({"text": None}, "'text' is null"),
        ({"messages": [{"role": "assistant", "content": "x"}], "text": "x"}, "fits 2 formats: 'chat' and 'text'"),
        ({"\ud800": "x"}, "no known format"),
        ({}, "no known format"),
    ],
)
def test_rows_that_fit_no_format(row: dict[str, object], what: str) -> None:
    with pytest.raises(DataError, match=what) as caught:
        parse(Row(row, "chat.jsonl:7"))
    problem = caught.value.problems[0]
    assert problem.where.startswith("chat.jsonl:7")
    assert problem.fix
    assert str(caught.value).encode()
    assert pickle.loads(pickle.dumps(caught.value)).problems == caught.value.problems


@pytest.mark.parametrize(
    ("role", "meant"),
    [("asistant", "assistant"), ("Assistant", "assistant"), ("human", "user"), ("gpt", "assistant"), ("developer", "system")],
)
def test_the_nearest_role_is_named(role: str, meant: str) -> None:
    with pytest.raises(DataError, match="unknown role") as caught:
        parsed({"messages": [{"role": role, "content": "x"}]})
    assert f"did you mean '{meant}'" in caught.value.problems[0].fix


def test_the_nearest_format_is_named_with_the_mapping() -> None:
    with pytest.raises(DataError, match="no known format") as caught:
        parsed({"Questions": "q", "answers": "a", "id": 1})
    assert "columns: {question: Questions, answer: answers}" in caught.value.problems[0].fix
    assert '"Questions": "q"' in caught.value.problems[0].excerpt


@pytest.mark.parametrize(
    "row", [{"\x1b[2J\x9b\u202e": "x"}, {"question\n\x1b": "\x9b2J\u202e\ud800", "answer": "x"}, {"text": None, "\x9b": 1}]
)
def test_no_terminal_obeys_an_error_about_a_row(row: dict[str, object]) -> None:
    with pytest.raises(DataError) as caught:
        parsed(row)
    for problem in caught.value.problems:
        assert problem.what.isprintable()
        assert problem.excerpt.isprintable()
        assert problem.fix.isprintable()
