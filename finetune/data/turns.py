"""Where each turn of a conversation stands in the text that the chat template writes.

An assistant's answer begins after the generation prompt (what the template writes to ask for a turn) and ends with its end-of-turn token.
The usual way costs one rendering for a conversation. It is taken where a probe has shown, once for each kind of conversation, that what
the model is asked with is how the training text begins. Else every prefix of the conversation is rendered and compared, which is
quadratic; where even those differ, the row is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from finetune.data.records import Conversation, Message
from finetune.data.template import ChatTemplate, Rendered
from finetune.errors import DataError


class Answer(NamedTuple):
    """The words of one assistant turn: characters ``start`` to ``end`` of the text, its end-of-turn token included."""

    number: int
    """Place of the message in the conversation."""
    start: int
    end: int


class Chat(NamedTuple):
    """A conversation as text."""

    text: str
    regions: tuple[tuple[int, int], ...] | None
    """Characters of each message with its header; None where they cannot be told."""
    answers: tuple[Answer, ...]
    prompt: str
    """The generation prompt that stands before each answer; empty where there is none, or where it was not looked for."""


_CALL = {"type": "function", "id": "call00001", "function": {"name": "probe", "arguments": {"key": "value"}}}
_RESULT = Message("tool", "Result.", name="probe", tool_call_id="call00001")


class _Kind(NamedTuple):  # looked up for every row, and a tuple's hash is quicker than a dataclass's
    """What a template may treat in its own way."""

    with_system: bool
    with_tools: bool
    with_calls: bool
    several: bool  # answers
    last: str  # role

    def messages(self) -> tuple[Message, ...]:
        """A conversation of this kind."""
        turns = [Message("system", "Be brief.")] if self.with_system else []
        turns.append(Message("user", "First question."))
        if self.with_calls:
            turns += [Message("assistant", "", tool_calls=(_CALL,)), _RESULT]
        turns.append(Message("assistant", "First answer."))
        if self.several:
            turns += [Message("user", "Second question."), Message("assistant", "Second answer.")]
            turns += [Message("user", "Third question."), Message("assistant", "Third answer.")]
        if self.last != "assistant":
            turns.append(Message("user", "Last question."))
        if self.last == "tool":
            turns += [Message("assistant", "", tool_calls=(_CALL,)), _RESULT]
        return tuple(turns)

    def tools(self) -> tuple[Mapping[str, Any], ...]:
        """The function that the probe calls."""
        schema = {"type": "object", "properties": {"key": {"type": "string", "description": "a key"}}, "required": ["key"]}
        function = {"name": "probe", "description": "A probe.", "parameters": schema}
        return ({"type": "function", "function": function},) if self.with_tools else ()


class Turns:
    """One compiled chat template, and what was found out about it."""

    def __init__(self, source: str, variables: Mapping[str, Any]) -> None:
        self._template = ChatTemplate(source, variables)
        self._stable: dict[_Kind, bool] = {}

    @cached_property
    def generation_prompt(self) -> str:
        """What is written to ask for an assistant's turn; empty for templates that need nothing, such as Mistral's."""
        for with_system in (False, True):  # some templates insist on a system message
            messages = _Kind(with_system, with_tools=False, with_calls=False, several=False, last="assistant").messages()[:-1]
            try:
                before, asking = self.text(messages), self.text(messages, ask=True)
            except DataError:
                if with_system:
                    raise
                continue
            if asking.startswith(before):
                return asking[len(before) :]
        raise DataError(
            "the chat template renders a turn differently when it asks for the next",
            where="chat template",
            fix="use a prefix-stable chat template",
        )

    def text(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), *, ask: bool = False, where: str = "chat template"
    ) -> str:
        """The conversation as the model reads it."""
        return self._render(messages, tools, ask=ask, where=where).text

    def chat(self, record: Conversation) -> Chat:
        """Text and answers; DataError where the answers cannot be told from the rest."""
        rendered = self._render(record.messages, record.tools, ask=False, where=record.where)
        answers = self._answers(record, rendered)
        if answers is None or not self._is_stable(record):
            return Chat(rendered.text, rendered.regions, self._by_prefixes(record, rendered.text), "")
        return Chat(rendered.text, rendered.regions, answers, self.generation_prompt)

    def whole(self, record: Conversation) -> Chat:
        """The text alone, for templates whose turns cannot or need not be told apart."""
        rendered = self._render(record.messages, record.tools, ask=False, where=record.where)
        return Chat(rendered.text, rendered.regions, (), "")

    def _render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], *, ask: bool, where: str) -> Rendered:
        return self._template.render([_plain(message) for message in messages], [_thawed(tool) for tool in tools], ask=ask, where=where)

    def _answers(self, record: Conversation, rendered: Rendered) -> tuple[Answer, ...] | None:
        """By the places that the template's own loop told; None where it told none, or no generation prompt stands there."""
        if rendered.regions is None:
            return None
        text, prompt, answers = rendered.text, self.generation_prompt, []
        for number, (start, end) in enumerate(rendered.regions):
            if record.messages[number].role == "assistant":
                if not text.startswith(prompt, start, end):
                    return None
                answers.append(Answer(number, start + len(prompt), start + len(text[start:end].rstrip())))
        return tuple(answers)

    def _is_stable(self, record: Conversation) -> bool:
        """Whether the prompt for each answer is how the whole text begins, for conversations like this one."""
        roles = [message.role for message in record.messages]
        if roles[0] == "assistant" or "system" in roles[1:]:
            return False
        with_calls = "tool" in roles or any(message.tool_calls for message in record.messages)
        # The last role too: some templates write the system's text into the last question, and here none comes after the last answer.
        kind = _Kind(roles[0] == "system", bool(record.tools), with_calls, roles.count("assistant") > 1 + with_calls, roles[-1])
        if kind not in self._stable:
            self._stable[kind] = self._probe(kind)
        return self._stable[kind]

    def _probe(self, kind: _Kind) -> bool:
        record = Conversation(kind.messages(), "chat template", kind.tools())
        try:
            rendered = self._render(record.messages, record.tools, ask=False, where=record.where)
            prompts = {
                number: self.text(record.messages[:number], record.tools, ask=True)
                for number, message in enumerate(record.messages)
                if message.role == "assistant"
            }
        except DataError:  # it refuses the probe: it may well take the user's rows, and those are compared one by one
            return False
        answers = self._answers(record, rendered) or ()
        return bool(answers) and all(
            rendered.text.startswith(prompts[answer.number]) and answer.start == len(prompts[answer.number]) for answer in answers
        )

    def _by_prefixes(self, record: Conversation, rendered: str) -> tuple[Answer, ...]:
        answers = []
        for number, message in enumerate(record.messages):
            if message.role != "assistant":
                continue
            before = self.text(record.messages[:number], record.tools, ask=True, where=record.where)
            through = self.text(record.messages[: number + 1], record.tools, where=record.where)
            if not (rendered.startswith(through) and through.startswith(before)):
                raise DataError(
                    "the chat template renders a turn differently once others follow, so its tokens cannot be told apart",
                    where=record.where,
                    fix="set data.supervise to `all`, or use a prefix-stable chat template",
                )
            answers.append(Answer(number, len(before), len(through.rstrip())))
        return tuple(answers)


def _plain(message: Message) -> dict[str, Any]:
    """As chat templates expect it: keys without a value are absent."""
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        turn["tool_calls"] = [_thawed(call) for call in message.tool_calls]
    if message.name is not None:
        turn["name"] = message.name
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    return turn


def _thawed(value: Any) -> Any:
    """Plain dicts and lists: `tojson` writes no other mapping, and the sandbox knows no other to be safe."""
    if isinstance(value, Mapping):
        return {key: _thawed(item) for key, item in value.items()}
    return [_thawed(item) for item in value] if isinstance(value, (list, tuple)) else value
