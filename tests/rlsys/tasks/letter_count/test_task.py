"""The letter counting task: splits, chains and verdicts."""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import problem_of

from rlsys.config.tasks import LetterCountConfig, TagShares
from rlsys.errors import ConfigError, DataError
from rlsys.tasks import build_task, tags
from rlsys.tasks.letter_count.task import LetterCountTask, chains, is_held_out, load_questions, words

NO_SHARES = TagShares(sub_task=0, hypothesis=0, double_check=0, reflection=0, reclarify=0)
AUTHORS_FILE = "marco_letter_count_hard.json"


def make_task(form: str = "simple", seed: int = 0, **fields: object) -> LetterCountTask:
    return LetterCountTask(LetterCountConfig.model_validate({"form": form, **fields}), seed)


def word_of(question: str) -> str:
    return re.findall(r"[a-z]+", question)[-1]


def thinking_letters(chain: str) -> str:
    """Return the letters of the thinking nodes, without a node that a reflection rejects."""
    accepted = re.sub(r"<thinking>[^<]*</thinking><reflection>[^<]*</reflection>", "", chain)
    return "".join(re.findall(r"[a-z]", "".join(re.findall(r"<thinking>(.*?)</thinking>", accepted))))


@pytest.mark.parametrize("form", ["simple", "words"])
def test_problem_is_a_pure_function_of_seed_split_and_index(form: str) -> None:
    first, second = make_task(form), pickle.loads(pickle.dumps(make_task(form)))
    assert [first.problem("train", i) for i in (5, 3, 9)] == [second.problem("train", i) for i in (5, 3, 9)]
    others = [make_task(form, seed=1).problem("train", i).question for i in range(20)]
    assert [first.problem("train", i).question for i in range(20)] != others


def test_a_known_problem_stays_the_same_over_versions() -> None:
    # Runs are reproducible only if the generator does not change.
    assert make_task().problem("train", 0).question == "count a in aaabhghabf"


@pytest.mark.parametrize("form", ["simple", "words"])
def test_train_and_held_out_share_no_word(form: str) -> None:
    train = {word_of(make_task(form, seed=3).problem("train", i).question) for i in range(400)}
    held_out = {word_of(make_task(form, seed=4).problem("held_out", i).question) for i in range(400)}
    assert not train & held_out
    assert all(is_held_out(word) for word in held_out) and not any(is_held_out(word) for word in train)


@given(index=st.integers(0, 10**9))
@settings(max_examples=60)
def test_answer_is_the_count_of_the_named_letters(index: int) -> None:
    simple = make_task().problem("train", index)
    [(letter, word)] = re.findall(r"^count ([a-h]) in ([a-h]{5,12})$", simple.question)
    assert simple.answer == str(sum(character == letter for character in word))
    problem = make_task("words", min_length=4, max_length=14).problem("train", index)
    pattern = r".* ([a-z]) and ([a-z]) .*\b([a-z]{4,14})[.?]"
    [(one, two, word)] = re.findall(f"^{pattern}$", problem.question)
    assert one != two
    assert problem.answer == str(sum(character in (one, two) for character in word))


def test_answers_zero_to_six_all_occur() -> None:
    for task in (make_task(), make_task("words", min_length=4, max_length=14)):
        answers = [int(task.problem("train", i).answer) for i in range(600)]
        assert set(range(7)) <= set(answers)
        # 2, 3 and 4 together are more than 40 percent of either form.
        assert sum(2 <= answer <= 4 for answer in answers) > 0.4 * len(answers)


def test_a_chain_by_hand() -> None:
    # Letters a and c of "abcab", three letters per node: a1 b1 c2, then a3 b3.
    chain = chains.build_chain("abcab", "ac", chunk=3, error_rate=0.0, shares=NO_SHARES, rng=random.Random(0))
    assert chain == "<thinking>a1b1c2</thinking><thinking>a3b3</thinking><answer>3</answer>"


def test_every_increment_is_wrong_at_error_rate_near_one() -> None:
    # Each letter adds the wrong number: a adds 0, b adds 1.
    assert chains.running_counts("aab", "a", 1.0, random.Random(0)) == [0, 0, 1]
    # Without left out letters, a adds 1 and b adds 1.
    assert chains.running_counts("aab", "a", 1.0, random.Random(0), "extra") == [1, 2, 3]


@given(index=st.integers(0, 10**6))
@settings(max_examples=60)
def test_extra_counts_do_not_cancel(index: int) -> None:
    task = make_task(error_rate=0.2, miscounts="extra", shares=NO_SHARES)
    problem, chain = task.demonstration(index, random.Random(index))
    verdict = task.check_steps(problem.question, chain)
    assert verdict is not None and (verdict.wrong_node is None) == bool(task.verify(problem, chain).reward)


def test_all_nodes_by_hand() -> None:
    shares = TagShares(sub_task=1, hypothesis=1, double_check=1, reflection=1, reclarify=1)
    # With one letter, the planted error is known: the wrong count is 0 instead of 1.
    chain = chains.build_chain("a", "a", chunk=3, error_rate=0.9, shares=shares, rng=random.Random(0))
    guess = re.search(r"<hypothesis>(\d)</hypothesis>", chain)
    assert guess and guess.group(1) in "012"
    assert chain.replace(guess.group(0), "") == (
        "<sub-task>count a</sub-task><reclarify>a?</reclarify><thinking>a0</thinking>"
        "<reflection>0 is wrong</reflection><thinking>a1</thinking><double-check>a1</double-check>"
        "<answer>1</answer>"
    )


@given(seed=st.integers(0, 10**6), chunk=st.integers(1, 5), form=st.sampled_from(["simple", "words"]))
@settings(max_examples=80)
def test_chains_spell_the_word_and_end_in_the_answer(seed: int, chunk: int, form: str) -> None:
    task = make_task(form, chunk=chunk, error_rate=0, shares={"reflection": 0.5})
    problem, chain = task.demonstration(seed, random.Random(seed))
    assert thinking_letters(chain) == word_of(problem.question)
    verdict = task.verify(problem, chain)
    assert (verdict.outcome, verdict.reward, verdict.answered) == ("ok", 1.0, True)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=60)
def test_a_reflected_chain_holds_an_error_and_ends_right(seed: int) -> None:
    shares = NO_SHARES.model_copy(update={"reflection": 1.0})
    rng = random.Random(seed)
    chain = chains.build_chain("abcabcab", "a", chunk=3, error_rate=0.5, shares=shares, rng=rng)
    pattern = r"<thinking>(\w*)</thinking><reflection>(\d) is wrong</reflection><thinking>(\w*)</thinking>"
    wrong, rejected, right = re.findall(pattern, chain)[0]
    assert wrong != right and wrong.endswith(rejected)
    assert abs(int(wrong[-1]) - int(right[-1])) == 1
    assert tags.final_answer(chain) == "3"


def test_shares_of_the_tags_are_met() -> None:
    shares = {"sub_task": 0.3, "hypothesis": 0.1, "double_check": 0.2, "reflection": 0.15, "reclarify": 0.05}
    task, rng, rows = make_task(shares=shares), random.Random(0), 3000
    texts = [task.demonstration(i, rng)[1] for i in range(rows)]
    for name, share in shares.items():
        measured = sum(f"<{name.replace('_', '-')}>" in text for text in texts) / rows
        # Four standard deviations of a binomial share: 4 sqrt(p (1-p) / n), at most 0.034 here.
        assert abs(measured - share) < 4 * math.sqrt(share * (1 - share) / rows), name
    assert all("<thinking>" in text and text.count("<answer>") == 1 for text in texts)


def test_error_rate_is_met() -> None:
    rng, letters = random.Random(0), 8000
    counts = chains.running_counts("b" * letters, "a", 0.1, rng)
    # Each b adds 1 with probability 0.1: mean 800, standard deviation sqrt(8000 * 0.09) = 26.8.
    assert abs(counts[-1] - 800) < 4 * 26.9


@pytest.mark.parametrize(
    ("completion", "outcome", "reward", "answered"),
    [
        ("<thinking>a1</thinking><answer>3</answer>", "ok", 1.0, True),
        ("<answer> 3 </answer>\n", "ok", 1.0, True),
        ("<answer>03</answer>", "ok", 1.0, True),
        ("<answer>4</answer>", "wrong", 0.0, True),
        ("<answer>-3</answer>", "wrong", 0.0, False),
        ("<answer>three</answer>", "wrong", 0.0, False),
        ("<answer></answer>", "wrong", 0.0, False),
        ("<answer>\u0663</answer>", "wrong", 0.0, False),  # an Arabic digit three
        ("3", "wrong", 0.0, False),
        ("", "wrong", 0.0, False),
        ("<answer>3", "wrong", 0.0, False),
        ("<answer>3</answer> or so", "wrong", 0.0, False),
        ("<answer>3</answer><thinking>a1</thinking>", "wrong", 0.0, False),
        ("<answer>2</answer><answer>3</answer>", "wrong", 0.0, False),
        ("<answer>2<answer>3</answer>", "wrong", 0.0, False),
        ("<answer>3</answer></answer>", "wrong", 0.0, False),
    ],
)
def test_verify(completion: str, outcome: str, reward: float, answered: bool) -> None:
    verdict = make_task().verify(problem_of("3"), completion)
    assert (verdict.outcome, verdict.reward, verdict.answered) == (outcome, reward, answered)


def write_questions(folder: Path, rows: object) -> Path:
    path = folder / "questions.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def test_questions_file_is_the_held_out_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The file has words that the train split would have without it.
    file_questions = [make_task("words").problem("train", i).question for i in range(50)]
    rows = [{"id": f"q{i}", "problem": question, "solution": i} for i, question in enumerate(file_questions)]
    write_questions(tmp_path, rows)
    monkeypatch.setenv("QUESTIONS", str(tmp_path))
    task = make_task("words", questions_path="${QUESTIONS}/questions.json")
    assert task.size("held_out") == 50 and task.size("train") is None
    assert make_task("words").size("held_out") is None
    digest = task.digest()
    assert make_task("words").digest() == "" and len(digest) == 64
    write_questions(tmp_path, [*rows[:-1], {**rows[-1], "solution": 9}])
    assert make_task("words", questions_path="${QUESTIONS}/questions.json").digest() != digest
    assert (task.problem("held_out", 7).problem_id, task.problem("held_out", 7).answer) == ("q7", "7")
    excluded = {word_of(question) for question in file_questions}
    assert not excluded & {word_of(task.problem("train", i).question) for i in range(300)}


def test_questions_path_errors_name_the_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(ConfigError, match=r"task.questions_path.*NOT_SET is not set"):
        load_questions("${NOT_SET}/x.json")
    with pytest.raises(DataError, match=r"task.questions_path .*missing.json"):
        load_questions(str(tmp_path / "missing.json"))
    with pytest.raises(DataError, match=r"expected a list"):
        load_questions(str(write_questions(tmp_path, {})))
    with pytest.raises(DataError, match=r"row 1: expected .*solution: integer"):
        rows = [{"id": "a", "problem": "x", "solution": 1}, {"id": "b", "problem": "x", "solution": "1"}]
        load_questions(str(write_questions(tmp_path, rows)))
    with pytest.raises(DataError, match=r"task\.questions_path .*two questions have the id '7'"):
        rows = [{"id": name, "problem": "x", "solution": 1} for name in ("7", "8", 7)]
        load_questions(str(write_questions(tmp_path, rows)))
    (tmp_path / "questions.json").write_text("not json")
    with pytest.raises(DataError, match=r"readable JSON"):
        load_questions(str(tmp_path / "questions.json"))


def test_an_alphabet_without_held_out_words_is_an_error() -> None:
    # Only the word a exists, and it is not in the held-out bucket.
    assert not is_held_out("a")
    with pytest.raises(ConfigError, match=r"task.alphabet"):
        make_task(alphabet="a", min_length=1, max_length=1).problem("held_out", 0)


def test_build_task_takes_the_config_section() -> None:
    assert isinstance(build_task(LetterCountConfig(), 0), LetterCountTask)


@pytest.mark.skipif("RLSYS_DATA" not in os.environ, reason="RLSYS_DATA does not name the data folder")
def test_no_word_of_the_authors_questions_is_trained_on() -> None:
    path = Path(os.environ["RLSYS_DATA"]) / AUTHORS_FILE
    task = make_task("words", min_length=4, max_length=14, questions_path=str(path))
    authors = {word_of(row["problem"]) for row in json.loads(path.read_text())}
    assert len(authors) == 500 and authors == task.excluded
    for index in range(5000):
        assert word_of(task.problem("train", index).question) not in authors


@pytest.mark.skipif("RLSYS_DATA" not in os.environ, reason="RLSYS_DATA does not name the data folder")
def test_the_seven_phrasings_are_the_authors() -> None:
    rows = json.loads((Path(os.environ["RLSYS_DATA"]) / AUTHORS_FILE).read_text())
    phrasings = set()
    for row in rows:
        # Without the letters and the word, the three pieces of the phrasing remain.
        without_word = re.sub(r"[a-z]+([.?])$", r"|\1", row["problem"])
        phrasings.add(tuple(re.sub(r" [a-z] and [a-z]\b", "|", without_word).split("|")))
    assert phrasings == set(words.PHRASINGS)


SIMPLE, WORDS = "count a in abcab", "How many e and a are there in total in aeon?"


@pytest.mark.parametrize(
    ("question", "chain", "wrong_node", "detail"),
    [
        (SIMPLE, "<thinking>a1b1c1</thinking><thinking>a2b2</thinking><answer>2</answer>", None, ""),
        (SIMPLE, "<thinking>a1</thinking><thinking>b1c1a2", None, ""),
        (SIMPLE, "<thinking>a1b1c1</thinking><thinking>a1b1</thinking>", 1, "the count after letter 4 (a) is 2, not 1"),
        (SIMPLE, "<thinking>a1b1c1</thinking><thinking>b1</thinking>", 1, "letter 4 is a, not b"),
        (SIMPLE, "<thinking>a1b1c1a2b2</thinking><thinking>b2</thinking>", 1, "letter 6 is missing, not b"),
        (SIMPLE, "<thinking>a</thinking>", 0, "expected letters, each with a count, found 'a'"),
        # The second thought is taken back, and the third replaces it.
        (SIMPLE, "<thinking>a1</thinking><thinking>b2</thinking><reflection>2 is wrong</reflection>"
         "<thinking>b1c1</thinking>", None, ""),
        (SIMPLE, "<thinking>a1</thinking><thinking>b2</thinking><reflection>1 is wrong</reflection>", 2, "'1 is"),
        (SIMPLE, "<thinking>a1</thinking><reflection>1 is wrong</reflection>", 1, "'1 is wrong' does not name"),
        # The right number, but from thoughts that do not lead to it.
        (SIMPLE, "<thinking>a1b1c1</thinking><answer>2</answer>", 1, "2 letters are not counted yet"),
        (SIMPLE, "<thinking>a1b1c1</thinking><double-check>a1</double-check>", 1, "2 letters are not counted yet"),
        (SIMPLE, "<thinking>a1b1c1a2b2</thinking><double-check>a1</double-check>", 1, "expected 'a2', found 'a1'"),
        (SIMPLE, "<thinking>a1b1c1a2b2</thinking><answer>3</answer>", 1, "expected 2, found '3'"),
        (SIMPLE, "<sub-task>count b</sub-task>", 0, "expected 'count a', found 'count b'"),
        (SIMPLE, "<sub-task>count a</sub-task><reclarify>a?</reclarify><hypothesis>9</hypothesis>", None, ""),
        (SIMPLE, "<hypothesis>a</hypothesis>", 0, "expected "),
        # e and a are counted: a1 e2 o2 n2.
        (WORDS, "<sub-task>count e and a</sub-task><thinking>a1e2o2n2</thinking><double-check>ea2</double-check>"
         "<answer>2</answer>", None, ""),
        (WORDS, "<reclarify>e and a?</reclarify><thinking>a1e1</thinking>", 1, "the count after letter 2 (e)"),
    ],
)  # fmt: skip
def test_steps(question: str, chain: str, wrong_node: int | None, detail: str) -> None:
    verdict = make_task().check_steps(question, chain)
    assert verdict is not None and verdict.wrong_node == wrong_node
    assert verdict.detail.startswith(detail)


def test_a_question_of_unknown_form_has_no_rules() -> None:
    assert make_task().check_steps("Is the letter a in the word?", "<thinking>a1</thinking>") is None


@given(index=st.integers(0, 10**6), form=st.sampled_from(["simple", "words"]))
@settings(max_examples=60)
def test_steps_of_demonstrations_without_errors_are_right(index: int, form: str) -> None:
    task = make_task(form, error_rate=0, shares=dict.fromkeys(TagShares.model_fields, 0.5))
    problem, chain = task.demonstration(index, random.Random(index))
    verdict = task.check_steps(problem.question, chain)
    assert verdict is not None and verdict.wrong_node is None


def test_longer_words_than_in_the_demonstrations() -> None:
    task = make_task(min_length=13, max_length=20, demonstrations={"min_length": 5, "max_length": 12})
    shown = {len(word_of(task.demonstration(i, random.Random(i))[0].question)) for i in range(200)}
    asked = {len(word_of(task.problem(split, i).question)) for i in range(200) for split in ("train", "held_out")}
    assert (min(shown), max(shown)) == (5, 12)
    assert (min(asked), max(asked)) == (13, 20)
