"""The benchmark's figures: what each is made of, on a random model whose answers are known another way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.config.data import Data, Icd10cm
from finetune.config.evaluation import Evaluation, KnowledgeTask
from finetune.data.icd10cm import facts
from finetune.data.icd10cm_questions import KINDS
from finetune.data.render import Example, Renderer
from finetune.evaluation import knowledge
from finetune.evaluation.choices import Judged
from finetune.evaluation.comparison import Measurement
from finetune.evaluation.conclusions import ASKED, CONTROL, READ, TRAINED, headlines
from finetune.evaluation.knowledge import Section, _binding, _Marked, has_form, sections
from finetune.evaluation.likeliest import likeliest
from finetune.evaluation.statistics import mean, ratio
from finetune.scoring import Scorer

pytest.importorskip("simple_icd_10_cm")
SOURCE = Icd10cm(source="builtin:icd10cm", document_facts=2, question_facts=2, control_facts=2)


@pytest.fixture(scope="module")
def renderer(tiny_tokenizer_dir: Path) -> Renderer:
    return Renderer(AutoTokenizer.from_pretrained(tiny_tokenizer_dir))


@pytest.fixture(scope="module")
def scorer(make_tiny_model: Callable[..., Path]) -> Scorer:
    directory = make_tiny_model(tied=False, initializer_range=0.1, max_position_embeddings=4096)
    return Scorer(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), torch.device("cpu"), "fp32")


# --- sections and figures ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(scorer: Scorer, renderer: Renderer) -> Measurement:
    task = KnowledgeTask(task="knowledge", asks=("knowledge", "memory", "reversed"), controls=("five-shot", "open-book"))
    return knowledge.measure(scorer, renderer, sections([SOURCE], task), generate=True, samples=3)


def test_each_section_has_figures_by_arm(measured: Measurement) -> None:
    groups = dict.fromkeys(one.name.partition(": ")[0] for one in measured.quantities)
    main = [ASKED, READ, TRAINED, CONTROL]
    labels = ("in trained words", "reversed", "after five examples", "with the document")
    assert list(groups) == [*main, "style alone", *(f"{arm}, {label}" for label in labels for arm in (TRAINED, CONTROL))]
    assert len(measured.answers) == 3
    assert measured.named(f"{TRAINED}: exact match") is not None
    assert measured.named(f"{TRAINED}, reversed: exact match") is None


def test_the_control_is_to_stay_and_the_rest_to_improve(measured: Measurement) -> None:
    for one in measured.quantities:
        if "control" in one.name or "style" in one.name:
            assert one.better == "same", one.name
        else:
            assert one.better == ("lower" if one.name.endswith("answer loss") else "higher"), one.name


def test_facts_are_what_is_drawn(scorer: Scorer, renderer: Renderer) -> None:
    task = KnowledgeTask(task="knowledge", questions_per_fact=3)
    found = knowledge.measure(scorer, renderer, sections([SOURCE], task), generate=False, samples=0)
    quantity = found.named(f"{TRAINED}: answer loss")
    assert quantity is not None
    assert quantity.n == 12
    assert len(set(quantity.clusters)) == 4
    assert found.answers == {}


def test_what_an_answer_opens_with_is_not_scored(scorer: Scorer, renderer: Renderer) -> None:
    """Memory is asked as a line of a page: the loss is that of the title alone, as the model's own cross-entropy has it."""
    [section] = sections([SOURCE], KnowledgeTask(task="knowledge", asks=("memory",)))
    one = Section(section.label, section.asked[:1])
    question = one.asked[0]
    turns = [{"role": "user", "content": question.prompt[0]["content"]}]
    opened = renderer.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False) + question.opening
    before = renderer.tokenizer(opened, add_special_tokens=False)["input_ids"]
    answer = renderer.tokenizer(question.answer + "<|im_end|>", add_special_tokens=False)["input_ids"]
    labels = torch.tensor([[-100] * len(before) + answer])
    with torch.no_grad():
        loss = scorer.model(input_ids=torch.tensor([before + answer]), labels=labels).loss
    quantities = knowledge.measure(scorer, renderer, [one], generate=False, samples=0).quantities
    measured = next(one for one in quantities if one.name.endswith("answer loss"))
    assert measured.value == pytest.approx(float(loss), abs=1e-5)


def test_a_control_fact_that_another_source_trains_is_not_asked() -> None:
    other = Icd10cm(source="builtin:icd10cm", document_facts=190, question_facts=190, control_facts=2, seed=1)
    trained = {fact.code for fact in facts(other) if fact.arm != "control"}
    asked = {source.seed: sections([source], KnowledgeTask(task="knowledge"))[0].asked for source in (SOURCE, other)}
    control = {one.fact.code for found in asked.values() for one in found if one.fact.arm == "control"}
    assert control & trained, "the case is one"
    [section] = sections([SOURCE, other], KnowledgeTask(task="knowledge"))
    assert not trained & {one.fact.code for one in section.asked if one.fact.arm == "control"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_can_be_measured(kind: str, scorer: Scorer, renderer: Renderer) -> None:
    found = knowledge.measure(
        scorer, renderer, sections([SOURCE], KnowledgeTask(task="knowledge", asks=(kind,))), generate=False, samples=0
    )
    assert all(np.isfinite(one.value) for one in found.quantities)


def test_binding_compares_an_answer_with_itself_after_other_questions() -> None:
    """A title that is likely everywhere is bound to nothing; one that is likely after its own term alone is."""
    asked = sections(
        [Icd10cm(source="builtin:icd10cm", document_facts=2, question_facts=0, control_facts=1)], KnowledgeTask(task="knowledge")
    )
    first, second = [one for one in asked[0].asked if one.fact.arm == "documents"]
    assert (first.rivals, second.rivals) == ((second.answer,), (first.answer,))
    marked = [
        _Marked(first, Judged(first.answer, {first.answer: (2.0, 4), second.answer: (9.0, 3)}), 0, None),
        _Marked(second, Judged(second.answer, {second.answer: (3.0, 3), first.answer: (2.0, 4)}), 0, None),
    ]
    assert _binding(marked) == {0: pytest.approx(0.0), 1: pytest.approx(2.0)}


# --- teacher-forced ------------------------------------------------------------------------------------------------------------------


def test_the_likeliest_tokens_are_those_that_greedy_decoding_gives(scorer: Scorer) -> None:
    prompts = [[5, 9, 30, 31], [7, 8], [40, 41, 42, 43, 44, 45, 46]]
    examples = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(scorer.model(torch.tensor([ids])).logits[0, -1].argmax()))
        examples.append(Example(tuple(ids), (*(False for _ in prompt), *(True for _ in range(6))), "greedy"))
    assert likeliest(scorer, examples) == [(6, 6)] * 3
    changed = Example((*examples[0].ids[:-1], (examples[0].ids[-1] + 1) % 320), examples[0].mask, "changed")
    assert likeliest(scorer, [changed, examples[1]]) == [(5, 6), (6, 6)]


@pytest.mark.parametrize(
    ("text", "formed"),
    [("Hereditary hemorrhagic telangiectasia", True), ("", False), ("It is gout.", False), ("Gout\nor not", False), ("a b c d e f", False)],
)
def test_a_title_is_one_short_line_and_no_sentence(text: str, formed: bool) -> None:
    assert has_form(text, most_words=5) is formed


# --- conclusions ---------------------------------------------------------------------------------------------------------------------


def _planted(gain: dict[str, float], forgotten: float) -> dict[str, dict[str, Measurement]]:
    """Base and tuned, where the answer loss of every arm falls by ``gain`` and general text is forgotten."""
    generator = np.random.default_rng(0)
    rows = {arm: generator.gamma(4, 1, 20) for arm in gain}
    text = generator.gamma(4, 0.5, 33)

    def system(share: float) -> dict[str, Measurement]:
        losses = [
            ratio(
                f"{arm}: answer loss",
                "nats/token",
                "lower",
                (5 * (values - share * (gain[arm] + 0.1 * generator.standard_normal(20))), [5] * 20),
                [f"{arm}{place}" for place in range(20)],
            )
            for arm, values in rows.items()
        ]
        general = mean("general text: loss", "nats/token", "lower", text + share * (forgotten + 0.01 * text), range(33))
        return {"knowledge": Measurement(tuple(losses)), "forgetting": Measurement((general,))}

    found = {"base": system(0.0), "tuned": system(1.0)}
    return {task: {name: one[task] for name, one in found.items()} for task in ("knowledge", "forgetting")}


def test_substance_is_what_trained_facts_gain_beyond_the_control() -> None:
    planted = _planted({ASKED: 3.0, READ: 2.0, TRAINED: 2.5, CONTROL: 0.5}, forgotten=0.1)
    found = {(one.name, one.measure): one for one in headlines(planted, {"tuned": "base"})}
    for name, expected in {"style": -0.5, "substance": -2.0, "extraction gap": -1.0}.items():
        change = found[name, "answer loss"].change
        assert change.difference == pytest.approx(expected, abs=0.1)
        assert change.low is not None
        assert change.high is not None
        assert change.low < expected + 0.1
        assert change.high > expected - 0.1
    assert found["substance", "answer loss"].change.verdict == "better"
    assert found["style", "answer loss"].change.verdict == "lower"
    efficiency = found["efficiency", "answer loss"].change
    assert efficiency.difference == pytest.approx(2.0 / (0.12 / 0.01), rel=0.1)
    assert efficiency.verdict == "better"


def test_there_is_no_efficiency_where_nothing_was_surely_forgotten() -> None:
    planted = _planted({ASKED: 3.0, READ: 2.0, TRAINED: 2.5, CONTROL: 0.5}, forgotten=-0.02)
    assert not [one for one in headlines(planted, {"tuned": "base"}) if one.name == "efficiency"]


def test_without_knowledge_there_are_no_conclusions() -> None:
    assert headlines({}, {"tuned": "base"}) == ()


def test_the_page_shows_settings_that_are_valid_and_names_every_section() -> None:
    page = (Path(__file__).parents[2] / "docs" / "knowledge.md").read_text(encoding="utf-8")
    sections_of_file = yaml.safe_load(page.partition("```yaml\n")[2].partition("```")[0])
    Data.model_validate(sections_of_file["data"])
    Evaluation.model_validate(sections_of_file["evaluation"])
    for asked, label in knowledge.LABELS.items():
        assert f"`{asked}`" in page
        assert asked in ("five-shot", "open-book") or label in page
