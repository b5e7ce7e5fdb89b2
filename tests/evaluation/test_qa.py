"""Questions on real contexts: files in the published formats, made small, and a run on them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from mplus_agents.errors import InvalidInputError
from mplus_agents.evaluation.datasets import QAExample, load_distractors, load_examples
from mplus_agents.evaluation.engines import load
from mplus_agents.evaluation.qa import QASettings, _Filler, _read, run_qa
from tests.engine.engines import TINY, prose, tiny_codec

_LONG = "the great blue ferry on the long and winding river under the index"


def _squad(version: str, paragraphs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"version": version, "data": [{"title": "Ferries", "paragraphs": paragraphs}]}


def _entry(number: int, question: str, texts: list[str], **more: Any) -> dict[str, Any]:
    answers = [{"text": text, "answer_start": 3} for text in texts]
    return {"id": f"5733be28{number}", "question": question, "answers": answers, **more}


@pytest.fixture
def squad(tmp_path: Path) -> Path:
    """SQuAD 2.0's form: answers several times, questions without an answer, plausible answers."""
    paragraphs = [
        {
            "context": "The ferry 17 is blue.",
            "qas": [_entry(1, " Which ferry is blue? ", ["17", "17", "ferry 17"])],
        },
        {"context": "A dog lived there.", "qas": [_entry(2, "Who lived?", [_LONG])]},
        {
            "context": "The number is 12.",
            "qas": [
                _entry(3, "Who?", [], is_impossible=True, plausible_answers=[{"text": "12", "answer_start": 14}]),
                _entry(4, "Which number?", ["12"], is_impossible=False),
                _entry(5, "What is it?", ["12"], is_impossible=False),
            ],
        },
    ]
    path = tmp_path / "dev-v2.0.json"
    path.write_text(json.dumps(_squad("v2.0", paragraphs)), encoding="utf-8")
    return path


@pytest.fixture
def distractors(tmp_path: Path) -> Path:
    codec = tiny_codec()
    texts = []
    for seed in range(5):
        words = prose(600, seed).split()
        while len(codec.encode(" ".join(words))) > 400:
            words = words[:-10]
        texts.append(" ".join(words))
    texts += [texts[0], "too short", prose(900)]
    paragraphs = [{"context": text, "qas": [_entry(9, "Why?", ["because"])]} for text in texts]
    path = tmp_path / "train-v1.1.json"
    path.write_text(json.dumps(_squad("1.1", paragraphs)), encoding="utf-8")
    return path


@pytest.fixture
def natural(tmp_path: Path) -> Path:
    """Simplified Natural Questions: words with HTML tags between, spans by word."""
    document = "<H1> Ferry </H1> <P> The ferry <B> number 17 </B> is blue . </P> <P> Other . </P>"
    words = document.split(" ")

    def line(question: str, long: tuple[int, int], short: list[tuple[int, int]], yes_no: str = "NONE") -> str:
        annotation = {
            "yes_no_answer": yes_no,
            "long_answer": {"start_token": long[0], "candidate_index": 0, "end_token": long[1]},
            "short_answers": [{"start_token": start, "end_token": end} for start, end in short],
            "annotation_id": 5937,
        }
        entry = {
            "document_text": document,
            "long_answer_candidates": [{"start_token": 3, "top_level": True, "end_token": 13}],
            "question_text": question,
            "annotations": [annotation],
            "document_url": "https://example.org",
            "example_id": 5655493461695504401,
        }
        return json.dumps(entry)

    first = words.index("17")
    lines = [
        line("which ferry is blue", (3, 13), [(first, first + 1), (first - 1, first + 1)]),
        line("is it blue", (3, 13), [], "YES"),
        line("who knows", (-1, -1), []),
    ]
    path = tmp_path / "simplified-nq-train.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_squad_gives_short_answers_one_per_context(squad: Path) -> None:
    assert load_examples("squad", squad, tiny_codec()) == [
        QAExample("The ferry 17 is blue.", "Which ferry is blue?", ("17", "ferry 17")),
        QAExample("The number is 12.", "Which number?", ("12",)),
    ]


def test_natural_questions_give_the_long_answer_without_tags(natural: Path) -> None:
    assert load_examples("naturalqa", natural, tiny_codec()) == [
        QAExample("The ferry number 17 is blue .", "Which ferry is blue?", ("17", "number 17")),
    ]


def test_natural_questions_are_read_in_their_original_form_too_and_from_gzip(natural: Path) -> None:
    lines = []
    for line in natural.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        words = entry.pop("document_text").split(" ")
        entry["document_tokens"] = [
            {"token": word, "html_token": word.startswith("<"), "start_byte": 0, "end_byte": 1} for word in words
        ]
        lines.append(json.dumps(entry))
    original = natural.with_name("nq-dev-00.jsonl.gz")
    original.write_bytes(gzip.compress("\n".join(lines).encode()))
    assert load_examples("naturalqa", original, tiny_codec()) == load_examples("naturalqa", natural, tiny_codec())
    original.write_bytes(original.read_bytes()[:40])
    with pytest.raises(InvalidInputError, match="damaged gzip file"):
        load_examples("naturalqa", original, tiny_codec())


def test_lines_end_at_line_feeds_alone(natural: Path) -> None:
    text = natural.read_text(encoding="utf-8").replace("number 17", "number\u202817")
    natural.write_text(f"\ufeff{text}", encoding="utf-8")
    assert load_examples("naturalqa", natural, tiny_codec())[0].context == "The ferry number\u202817 is blue ."


def test_distractors_have_300_to_500_tokens_and_come_once(distractors: Path) -> None:
    found = load_distractors(distractors, tiny_codec())
    assert len(found) == len(set(found)) == 5
    assert all(300 <= len(tiny_codec().encode(text)) <= 500 for text in found)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "allowed: JSON"),
        ("[]", "in the format of SQuAD"),
        ('{"data": [{"paragraphs": [{"qas": []}]}]}', "in the format of SQuAD \\('context' is missing\\)"),
        ('{"data": [{"paragraphs": [{"context": "a", "qas": [{"answers": 3}]}]}]}', "in the format of SQuAD"),
        ('{"data": [{"paragraphs": [{"context": "a", "qas": [{"answers": [{"text": 5}]}]}]}]}', "5 is no text"),
        ('{"data": []}', "a file with answers of at most 3 tokens"),
    ],
)
def test_another_format_is_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_text(content)
    with pytest.raises(InvalidInputError, match=f"file is .*{message}"):
        load_examples("squad", path, tiny_codec())


def test_wrong_lines_and_missing_files_are_refused(tmp_path: Path, squad: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text('{"document_text": "a"}\n')
    with pytest.raises(InvalidInputError, match="simplified Natural Questions \\('annotations' is missing\\)"):
        load_examples("naturalqa", path, tiny_codec())
    with pytest.raises(InvalidInputError, match="a file that can be read \\(No such file"):
        load_examples("squad", tmp_path / "none", tiny_codec())
    with pytest.raises(InvalidInputError, match="contexts of 300 to 500 tokens"):
        load_distractors(squad, tiny_codec())


def test_a_run_asks_after_every_step(squad: Path, distractors: Path) -> None:
    settings = QASettings(
        "squad", str(squad), str(distractors), str(TINY), episodes=2, steps=(0, 2), max_new_tokens=2, device="cpu"
    )
    done: list[tuple[int, int]] = []
    result = run_qa(settings, on_progress=lambda step, total: done.append((step, total)))
    assert done == [(1, 2), (1, 2)]
    assert (result.kind, result.streams, result.episodes, result.is_complete) == ("qa", 2, 2, True)
    found = {(point.variant, point.distance): point.episodes for point in result.points}
    expected = {
        (name, step): 2 for name in ("mplus", "theta_only", "random", "window", "no_context") for step in (0, 2)
    }
    assert expected.items() <= found.items()
    assert set(found) - set(expected) <= {("full_context", 0), ("full_context", 2)}
    assert run_qa(settings) == result


def test_words_to_fill_up_with_never_end() -> None:
    with load(str(TINY), "cpu").open() as mplus:
        agent, filler = mplus.agent("reader"), _Filler("the ferry left")
        for number in range(12):
            _read(agent, f"A short text, number {number}.", filler)
            assert agent.window == []


def test_too_few_distractors_are_refused(squad: Path, distractors: Path) -> None:
    with pytest.raises(InvalidInputError, match="distractors is '5 contexts'; allowed: a file with more than 10"):
        run_qa(QASettings("squad", str(squad), str(distractors), str(TINY), steps=(9,), device="cpu"))
    with pytest.raises(InvalidInputError, match="steps is \\(1, 1\\)"):
        QASettings("squad", "a", "b", steps=(1, 1))
