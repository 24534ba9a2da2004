"""Problems of the package reasoning-gym: splits, weights, scores, faults; and all its data sets in the long test."""

from __future__ import annotations

import asyncio
import builtins
import inspect
import os
import pickle
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from actors.verifiers.pool import RewardPool
from rlsys.config.outside_tasks import ReasoningGymConfig
from rlsys.config.rewards import RewardsConfig
from rlsys.config.tasks import TaskConfig
from rlsys.data.prompts import PromptBuilder
from rlsys.errors import ConfigError
from rlsys.tasks import build_task
from rlsys.tasks.reasoning_gym import FAULTS, RUNS_ANSWERS, ReasoningGymTask
from rlsys.types import Message, Problem, Split, Verdict

DOCS = Path(__file__).parents[3] / "docs" / "tasks.md"
pytestmark = pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _package(request: pytest.FixtureRequest) -> None:
    if "missing" not in request.node.name:
        pytest.importorskip("reasoning_gym")


def task_of(*names: str, seed: int = 0, **fields: Any) -> ReasoningGymTask:
    values = {"datasets": {name: {} for name in names}, "held_out_size": 5, **fields}
    task = build_task(ReasoningGymConfig.model_validate(values), seed)
    assert isinstance(task, ReasoningGymTask)
    return task


def questions(task: ReasoningGymTask, split: Split, count: int) -> list[Any]:
    return [task.problem(split, index).metadata["question"] for index in range(count)]


def test_problems_follow_from_the_seed_of_the_run_or_of_the_task() -> None:
    first = questions(task_of("leg_counting"), "train", 8)
    assert (
        first
        == questions(task_of("leg_counting"), "train", 8)
        != questions(task_of("leg_counting", seed=1), "train", 8)
    )
    assert first == questions(task_of("leg_counting", seed=5).__class__(
        ReasoningGymConfig.model_validate({"datasets": {"leg_counting": None}, "seed": 0}), 5), "train", 8)  # fmt: skip
    assert len({*first, *questions(task_of("leg_counting"), "held_out", 5)}) > 10


def test_a_training_problem_never_has_a_held_out_question() -> None:
    task = task_of("coin_flip", held_out_size=40)  # of about 50 that its generator draws often
    held_out, train = set(questions(task, "held_out", 40)), questions(task, "train", 60)
    assert not held_out & set(train)
    assert (task.size("train"), task.size("held_out")) == (None, 40)


def test_too_many_held_out_problems_are_refused() -> None:
    arguments = {"min_trials": 3, "max_trials": 3}
    task = task_of(datasets={"coin_flip": {"arguments": arguments}}, held_out_size=100)
    with pytest.raises(
        ConfigError, match=r"draws of coin_flip gave held-out questions only; lower task\.held_out_size"
    ):
        task.problem("train", 0)


def test_weights_and_arguments() -> None:
    sets = {"leg_counting": {"weight": 3}, "gcd": {"arguments": {"min_numbers": 4, "max_numbers": 4}}}
    task = task_of(datasets=sets, size=7)
    problems = [task.problem("train", index) for index in range(200)]
    names = [problem.metadata["source_dataset"] for problem in problems]
    assert 130 < names.count("leg_counting") < 170  # 150 expected, of standard deviation 6
    sums = [problem for problem in problems if problem.metadata["source_dataset"] == "gcd"]
    assert {len(problem.metadata["metadata"]["numbers"]) for problem in sums} == {4}
    assert task.size("train") == 7


def test_the_score_is_the_reward_and_only_a_score_of_1_is_right() -> None:
    task = task_of("leg_counting", "prime_factorization")
    problem = next(each for index in range(9) if "leg" in (each := task.problem("train", index)).question)
    answer = problem.answer
    for completion, reward, answered in (
        (f"So <answer>{answer}</answer>", 1.0, True),
        (rf"So \boxed{{{answer}}}.", 1.0, True),
        (f"<answer>{answer}{'!' * len(answer)}</answer>", 0.5, True),
        ("<answer>none</answer>", 0.0, True),
        (answer, 0.0, False),
        ("<answer></answer>", 0.0, False),
    ):
        verdict = task.verify(problem, completion)
        assert (verdict.reward, verdict.correct, verdict.answered) == (reward, reward == 1, answered), completion
    assert not task.verify(problem, f"<answer>{answer}</answer>", finished=False).answered
    other = next(each for index in range(9) if "prime" in (each := task.problem("train", index)).question)
    assert "its scorer raised ValueError" in task.verify(other, "<answer>x</answer>").detail


def test_prompts_and_pickles() -> None:
    task = task_of("gcd", system_prompt="Be brief.", prompt_template="Q: {question}")
    problem = task.problem("train", 0)
    assert problem.question == (
        Message(role="system", content="Be brief."),
        Message(role="user", content=f"Q: {problem.metadata['question']}"),
    )
    assert pickle.loads(pickle.dumps(task)).problem("train", 0) == problem
    assert task_of("gcd").problem("train", 0).question.endswith("between <answer> and </answer>.")


def test_long_problems_are_replaced() -> None:
    task = task_of("leg_counting", max_bad_rows=0.5)
    lengths = sorted(len(question) for question in questions(task, "train", 99))
    builder = PromptBuilder(
        task, lambda text: [1] * len(str(text)), max_model_len=lengths[70] + 60, max_tokens=1, max_bad_rows=0.5
    )
    prompts = [builder.generated(index) for index in range(99)]
    assert max(len(prompt.token_ids) for prompt in prompts) <= lengths[70] + 59
    assert len({prompt.prompt_id for prompt in prompts}) == 99


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (
            {"leg_count": {}},
            r"task\.datasets: reasoning-gym has no data set 'leg_count' of problems; did you mean leg_c",
        ),
        ({"composite": {}}, r"has no data set 'composite' of problems"),
        ({"gcd": {"arguments": {"least": 1}}}, r"task\.datasets\.gcd\.arguments: TypeError: .*the arguments are min_n"),
        ({"gcd": {"arguments": {"min_numbers": 0}}}, r"task\.datasets\.gcd\.arguments: AssertionError: "),
    ],
)
def test_faults(sets: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        task_of(datasets=sets)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *others: Any) -> Any:
        if name.startswith("reasoning_gym"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return original(name, *others)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"expected the package reasoning-gym.*pip install reasoning-gym"):
        task_of("gcd")


def test_known_faults_are_told() -> None:
    [note] = task_of("gcd", "game_of_life_halting").notes()
    assert note == "task.datasets: game_of_life_halting has a scorer that accepts every answer"
    [note] = task_of("n_queens", "puzzle24").notes()
    assert note == "task.datasets: scorers run answers as Python code (docs/security.md): n_queens, puzzle24"


def test_scorers_that_run_answers_are_listed() -> None:
    from reasoning_gym.factory import DATASETS

    sources = {name: inspect.getsource(kind.score_answer) for name, (kind, _) in DATASETS.items()}
    assert [name for name in sorted(sources) if re.search(r"\b(eval|parse_expr)\(answer\b", sources[name])] == [
        *RUNS_ANSWERS
    ]
    assert all(f"`{name}`" in DOCS.read_text() for name in RUNS_ANSWERS)


def all_names() -> list[str]:
    from reasoning_gym.factory import DATASETS

    return sorted(set(DATASETS) - {"composite"})


def documented() -> dict[str, str]:
    """Return what docs/tasks.md says about data sets that do not fit, by their names."""
    text = DOCS.read_text().partition("| data set | what does not fit |")[2]
    rows = re.findall(r"^\| (`.*) \| (.*) \|$", text, re.MULTILINE)
    return {name: reason for names, reason in rows for name in re.findall(r"`(\w+)`", names)}


def verified(config: TaskConfig, items: list[tuple[Problem, str]]) -> list[Verdict]:
    async def run() -> list[Verdict]:
        pool = RewardPool(config, 0, RewardsConfig())
        try:
            return await pool.verify(items)
        finally:
            await pool.close()

    return asyncio.run(run())


PARTS = 7
"""Parts of the list of all data sets, so that each test takes less than 20 s."""


@pytest.mark.long
@pytest.mark.parametrize("part", range(PARTS))
def test_all_data_sets_are_drawn_checked_and_verified_or_are_listed(part: int) -> None:
    """One problem of each goes through the code of `rlsys check` and, with its reference, to a verifier process."""
    names = all_names()[part::PARTS]
    items, others = [], []
    for name in names:
        task = task_of(name, held_out_size=2)
        builder = PromptBuilder(task, lambda text: list(str(text).encode()), max_model_len=1 << 20, max_tokens=1)
        assert builder.held_out(2) and builder.build("train", 0).token_ids.size
        assert all(name in note for note in task.notes())
        problem = task.problem("train", 0)
        items.append((problem, f"It follows.\n<answer>{problem.answer}</answer>"))
        others.append((problem, "<answer>none of them is right</answer>"))
    config = ReasoningGymConfig.model_validate({"datasets": {name: {} for name in names}})
    verdicts = verified(config, [*items, *others])
    assert {verdict.outcome for verdict in verdicts} == {"ok", "wrong"}
    faults = {}
    for name, (problem, _), right, other in zip(names, items, verdicts, verdicts[len(names) :], strict=False):
        assert right.correct == bool(problem.answer), (name, right)
        if not problem.answer:
            faults[name] = "no reference answers"
        if other.correct:
            faults[name] = "accepts every answer"
    listed = {name: reason for name, reason in documented().items() if name in names and "process" not in reason}
    assert faults.keys() == listed.keys() and all(fault in listed[name] for name, fault in faults.items())


def test_the_page_lists_what_the_notes_say() -> None:
    assert FAULTS.keys() == {name for name, reason in documented().items() if "no reference" not in reason}
    assert len(all_names()) == 105


@pytest.mark.long
@pytest.mark.parametrize("part", range(PARTS))
def test_the_data_sets_with_other_problems_in_every_process_are_listed(part: int) -> None:
    names = all_names()[part::PARTS]
    code = (
        "import sys\nfrom rlsys.config.outside_tasks import ReasoningGymConfig as C\n"
        "from rlsys.tasks import build_task\n"
        "for n in sys.argv[1:]:\n"
        "    t = build_task(C(datasets={n: {}}, held_out_size=6), 0); print(n, t.digest())\n"
    )

    def digests(seed: str, folder: str) -> list[str]:
        command = [sys.executable, "-W", "ignore", "-c", code, *names]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=folder)
        return ran.stdout.splitlines()

    with tempfile.TemporaryDirectory() as folder:  # codeio writes files
        one, other = digests("1", folder), digests("2", folder)
    differ = {line.split()[0] for line, second in zip(one, other, strict=True) if line != second}
    assert differ == {name for name, reason in documented().items() if "PYTHONHASHSEED" in reason} & set(names)
