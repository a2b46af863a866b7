"""MinHash against the similarity it estimates."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from finetune.data.near import SHINGLE, SignatureFile, Signatures, repeated, signatures
from finetune.data.records import Conversation, Message, Text

WORDS = [f"word{number}" for number in range(500)]


def shingles(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[start : start + SHINGLE]) for start in range(len(words) - SHINGLE + 1)}


def changed(text: str, count: int) -> str:
    """The last ``count`` words replaced."""
    return " ".join([*text.split()[:-count], *(f"other{number}" for number in range(count))]) if count else text


def pairs(directory: Path, texts: list[str], left: list[int], right: list[int]) -> list[tuple[int, int]]:
    file = SignatureFile(directory / "scratch")
    for start in range(0, len(texts), 3):  # in chunks, as they come
        file.append(signatures([Text(text, "") for text in texts[start : start + 3]]))
    found = file.partners(np.array(left), np.array(right), lambda a, _: np.zeros(len(a), dtype=bool))
    file.close()
    return list(zip(found[0].tolist(), found[1].tolist(), strict=True))


def test_the_estimate_is_near_the_similarity() -> None:
    generator = random.Random(0)
    for count in (0, 5, 20, 50, 100):
        text = " ".join(generator.choices(WORDS, k=200))
        other = changed(text, count)
        exact = len(shingles(text) & shingles(other)) / len(shingles(text) | shingles(other))
        a, b = signatures([Text(text, ""), Text(other, "")])
        assert float(np.mean(a == b)) == pytest.approx(exact, abs=0.2)  # four standard deviations


def test_alike_rows_meet_and_others_do_not(tmp_path: Path) -> None:
    generator = random.Random(1)
    texts = [" ".join(generator.choices(WORDS, k=100)) for _ in range(40)]
    texts += [changed(texts[number], 3) for number in range(10)]
    everything = list(range(50))
    assert pairs(tmp_path, texts, everything, everything) == [(number, 40 + number) for number in range(10)]


def test_sides_are_compared_with_each_other_alone(tmp_path: Path) -> None:
    text = " ".join(WORDS[:60])
    texts = [changed(text, 1), "something else that is long enough to count", text, changed(text, 2)]
    assert pairs(tmp_path, texts, [1, 3], [0, 2]) == [(3, 0), (3, 2)]


def test_case_spacing_and_system_messages_do_not_matter() -> None:
    def talk(system: str, text: str) -> Conversation:
        return Conversation((Message("system", system), Message("user", text), Message("assistant", "yes")), "")

    a, b, c = signatures([talk("one", "Is this  the Same?"), talk("two", "is this the same?"), talk("one", "is that the same?")])
    assert (a == b).all()
    assert not (a == c).all()


def test_short_rows_are_alike_only_where_they_are_equal() -> None:
    a, b, c = signatures([Text("yes", ""), Text("yes", ""), Text("no", "")])
    assert (a == b).all()
    assert np.mean(a == c) < 0.2


def test_signatures_do_not_depend_on_the_chunk() -> None:
    texts = [Text(" ".join(WORDS[n : n + 3 + n]), "") for n in range(20)]
    assert (signatures(texts) == np.concatenate([signatures(texts[:7]), signatures(texts[7:])])).all()
    assert signatures([]).shape == (0, 64)


def test_one_of_a_chain_of_alike_rows_stays() -> None:
    # 1 is near 0, 2 near 1: 2 stays, since what it is near to is left out; 3 is near 2
    out = repeated(np.array([0, 1, 2]), np.array([1, 2, 3]), 5)
    assert out.tolist() == [False, True, False, True, False]


def test_the_first_of_a_band_hides_no_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row may meet one that is not like it in the same bands as one that is."""
    monkeypatch.setattr(SignatureFile, "append", _append_with_one_band(SignatureFile.append))
    text = " ".join(WORDS[:60])
    assert pairs(tmp_path, ["something else that is long enough to count", text, changed(text, 1)], [0, 1, 2], [0, 1, 2]) == [(1, 2)]


def _append_with_one_band(append: Callable[[SignatureFile, Signatures], None]) -> Callable[[SignatureFile, Signatures], None]:
    def alike(self: SignatureFile, found: Signatures) -> None:
        append(self, found)
        for file in self._bands:  # every row meets every other
            file.seek(-8 * len(found), 2)
            file.write(bytes(8 * len(found)))

    return alike


CHINESE = "今天的天气非常好我们一起去公园散步然后吃午饭再去看电影最后回家休息准备明天的工作和学习任务"
THAI = "วันนี้อากาศดีมากเราไปเดินเล่นที่สวนสาธารณะแล้วกินข้าวเที่ยงด้วยกันจากนั้นไปดูหนังและกลับบ้านพักผ่อน"


@pytest.mark.parametrize(("text", "end"), [(CHINESE, "吧"), (THAI, "ๆ"), ("".join(f"{n:03d}" for n in range(90)), "z")])
def test_text_without_spaces_is_compared_by_characters(text: str, end: str) -> None:
    a, b, c = signatures([Text(text, ""), Text(text + end, ""), Text(text[::-1], "")])
    assert np.mean(a == b) >= 0.8
    assert np.mean(a == c) < 0.3


def test_words_among_chinese_stay_words() -> None:
    a, b = signatures(
        [Text(CHINESE + " with LoRA on a GPU " + CHINESE[::-1], ""), Text(CHINESE + "with lora on a gpu" + CHINESE[::-1], "")]
    )
    assert (a == b).all()


def test_tool_calls_and_tools_are_compared() -> None:
    def call(key: str, tool: str = "look up") -> Conversation:
        made = {"type": "function", "function": {"name": "look_up", "arguments": {"key": key}}}
        turns = (Message("user", "Please look it up for me"), Message("assistant", "", tool_calls=(made,)), Message("assistant", "yes"))
        return Conversation(turns, "", ({"type": "function", "function": {"name": tool}},))

    a, b, c, d = signatures([call("the heart and all its vessels"), call("a knee"), call("a knee"), call("a knee", "other")])
    assert np.mean(a == b) < 0.8
    assert (b == c).all()
    assert not (c == d).all()


def test_shared_tools_make_no_rows_alike() -> None:
    tools = ({"type": "function", "function": {"name": "look_up", "description": " ".join(WORDS[:200])}},)
    texts = ("one thing about kidneys and their stones", "another about the liver that is long enough")
    a, b = signatures([Conversation((Message("user", text),), "", tools) for text in texts])
    assert np.mean(a == b) < 0.2
