"""The preflight: the same checks in the same order for every command. Models and data are replaced."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlsys.config.engine_roles import Searching
from rlsys.config.files import parse_config
from rlsys.config.schema import Config, FromScratchConfig, LoraConfig
from rlsys.errors import ConfigError
from rlsys.launch import prepare as preflight
from rlsys.launch.prepare import Purpose, check_same_tokens, check_settings, prepare
from rlsys.launch.resources import Need, ResourcePlan
from rlsys.models.adapters import AdapterSpec
from rlsys.models.checks import Use
from rlsys.models.folder import ModelFolder
from rlsys.models.scratch import scratch_model

MODELS = {"model": {"path": "l", "count": 1, "max_model_len": 4096}, "reviewer": {"path": "r", "max_model_len": 1024}}
TOO_MUCH = Need("all", "memory, GiB", 2.0, 1.0, "actors.count")


def config(**sections: Any) -> Config:
    values = {"run": {"dir": "d"}, "model": {"path": "m"}, "task": {"type": "letter_count"}, **sections}
    return parse_config(values, "test")


class Checks:
    """Records the checks in their order, each with the arguments that matter. `needs` become those of every plan."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[Any] = []
        self.needs: list[Need] = []
        self.trained: int | None = None
        self.held: Path | None = None
        monkeypatch.setattr(preflight, "prepare_model", self.prepare_model)
        monkeypatch.setattr(preflight, "given_model", self.given_model)
        monkeypatch.setattr(preflight, "check_model", self.check_model)
        monkeypatch.setattr(preflight, "plan_resources", self.plan)
        monkeypatch.setattr(preflight, "check_tags", lambda _search, models: self.done.append(("tags", [*models])))
        monkeypatch.setattr(preflight, "check_same_tokens", lambda *_, **__: self.done.append("same tokens"))
        monkeypatch.setattr(preflight, "Inputs", self.inputs)
        monkeypatch.setattr(ModelFolder, "vocabulary", property(lambda model: 10 - len(str(model.path))))
        monkeypatch.setattr(preflight, "find_prompts", lambda *_: ["a prompt"])

    def prepare_model(self, config: Config, _run_dir: Path, *, build: bool) -> ModelFolder:
        self.done.append(("policy", build))
        return ModelFolder(Path("policy"))

    def given_model(self, name: str, field: str) -> ModelFolder:
        self.done.append(field)
        return ModelFolder(Path(name), field)

    def check_model(self, model: ModelFolder, use: Use) -> tuple[str, ...]:
        self.done.append(("judged", str(model.path), use.longest, use.trained))
        return ()

    def plan(
        self,
        config: Config,
        models: Mapping[str, ModelFolder],
        searching: Searching | None,
        *,
        learner: bool,
        trained: int | None = None,
        held: ModelFolder | None = None,
    ) -> ResourcePlan:
        assert (trained, held and held.path) == (self.trained, self.held)
        auxiliary = searching.auxiliary if searching else ()
        self.done.append(("plan", config.actors.max_model_len, learner, [engines.role for engines in auxiliary]))
        return ResourcePlan(config=config, auxiliary=auxiliary, ranks=int(learner), needs=self.needs)

    def inputs(self, _config: Config, model: ModelFolder, *, training: bool) -> Any:
        self.done.append(("inputs", model.path, training))
        return SimpleNamespace(notes=[])


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Checks:
    return Checks(monkeypatch)


POLICY = Path("policy")
JUDGED = ("judged", "policy", 256, True)
NOT_TRAINED = [("judged", "l", 4096, False), ("judged", "r", 1024, False)]
TRAIN = [("policy", True), JUDGED, ("plan", 256, True, []), ("inputs", POLICY, True)]
FIELDS = ["search.model.path", "search.reviewer.path"]
ALL = ["policy", "model", "reviewer"]
TAUGHT = {"teacher": {"model": {"path": "t", "max_model_len": 512}}, "objective": {"distill": {"weight": 1.0}}}
CASES: dict[str, tuple[Purpose, dict[str, Any], list[Any]]] = {
    "train": ("train", {}, TRAIN),
    "train that never searches": ("train", {"search": MODELS}, TRAIN),
    "train with trees": (
        "train",
        {"search": {**MODELS, "fraction": 0.5}},
        [
            ("policy", True),
            *FIELDS,
            *NOT_TRAINED,
            JUDGED,
            ("plan", 256, True, ALL[1:]),
            ("tags", ALL),
            ("inputs", POLICY, True),
        ],
    ),
    "train with a teacher": (
        "train",
        TAUGHT,
        [
            ("policy", True),
            "teacher.model.path",
            ("judged", "t", 512, False),
            "same tokens",
            JUDGED,
            ("plan", 256, True, ["teacher"]),
            ("inputs", POLICY, True),
        ],
    ),
    "evaluate without the teacher": (
        "evaluate",
        TAUGHT,
        [("judged", "e", 256, False), ("plan", 256, False, []), ("inputs", Path("e"), False)],
    ),
    "check": ("check", {}, [("policy", False), *TRAIN[1:]]),
    "check of a search": (
        "check",
        {"search": MODELS},
        [
            ("policy", False),
            *FIELDS,
            *NOT_TRAINED,
            JUDGED,
            ("plan", 256, True, []),
            ("plan", 4096, False, ["reviewer"]),
            ("tags", ALL),
            ("inputs", POLICY, True),
        ],
    ),
    "search": (
        "search",
        {"search": MODELS},
        [
            ("policy", True),
            *FIELDS,
            *NOT_TRAINED,
            ("judged", "policy", 256, False),
            ("plan", 4096, False, ["reviewer"]),
            ("tags", ALL),
            ("inputs", POLICY, False),
        ],
    ),
    "evaluate": (
        "evaluate",
        {"search": MODELS},
        [("judged", "e", 256, False), ("plan", 256, False, []), ("inputs", Path("e"), False)],
    ),
    "evaluate with search": (
        "evaluate",
        {"search": {"reviewer": MODELS["reviewer"]}, "evaluation": {"search_answers": 2}},
        [
            "search.reviewer.path",
            ("judged", "r", 1024, False),
            ("judged", "e", 256, False),
            ("plan", 256, False, ["reviewer"]),
            ("tags", ["policy", "reviewer"]),
            ("inputs", Path("e"), False),
        ],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_command_checks_in_the_same_order(checks: Checks, case: str) -> None:
    purpose, sections, expected = CASES[case]
    prepare(config(**sections), purpose, ModelFolder(Path("e")) if purpose == "evaluate" else None)
    assert checks.done == expected


def test_the_model_of_the_search_is_served_in_place_of_the_policy(checks: Checks) -> None:
    prepared = prepare(config(search=MODELS), "search")
    assert (prepared.served.path, prepared.policy.path) == (Path("l"), POLICY)
    assert prepared.config.actors.max_model_len == 4096
    assert [engines.role for engines in prepared.auxiliary] == ["reviewer"]


@pytest.mark.heavy
@pytest.mark.parametrize("field", ["teacher.model.path", "teacher.in_learner"])
def test_a_teacher_whose_ids_stand_for_other_tokens_is_refused(field: str, tmp_path: Path) -> None:
    size = FromScratchConfig(hidden_size=32, layers=1, heads=1, intermediate_size=16)
    own, same, other = (
        scratch_model(size, words, seed, tmp_path / str(seed))
        for seed, words in enumerate((["one", "two"], ["one", "two"], ["one", "ten"]))
    )
    check_same_tokens(own, same, field=field)
    with pytest.raises(ConfigError, match=f"{field} .*: expected the tokens of the policy .*same family"):
        check_same_tokens(own, other, field=field)


def test_a_teacher_with_fewer_tokens_than_it_must_score_is_refused() -> None:
    small: Any = SimpleNamespace(path=Path("t"), vocabulary_digest="a", vocabulary=8)
    check_same_tokens(small, small, 8)
    with pytest.raises(ConfigError, match="objective.distill.top_k 9 exceeds the 8 tokens of teacher.model.path"):
        check_same_tokens(small, small, 9)


def test_a_training_run_with_a_teacher_grows_no_trees(checks: Checks) -> None:
    prepared = prepare(config(**TAUGHT), "train")
    assert prepared.searching is not None and not prepared.searching.grows_trees
    assert prepared.served is prepared.policy
    assert [engines.role for engines in prepared.auxiliary] == ["teacher"]


@pytest.mark.parametrize("purpose", ["train", "search"])
def test_a_teacher_in_the_learner_is_checked_and_planned_where_it_is_held(checks: Checks, purpose: Purpose) -> None:
    checks.held = Path("t") if purpose == "train" else None
    held = {"distill": {"weight": 1.0, "divergence": "whole"}}
    prepared = prepare(config(teacher={"in_learner": "t"}, objective=held), purpose)
    assert prepared.auxiliary == ()
    if purpose == "search":
        assert prepared.held_teacher is None
        return
    assert prepared.held_teacher is not None and prepared.held_teacher.path == Path("t")
    teacher = ["teacher.in_learner", ("judged", "t", 256, False), "same tokens"]
    assert checks.done == [TRAIN[0], *teacher, *TRAIN[1:]]


def test_a_teacher_in_the_learner_knows_every_token_of_the_policy(checks: Checks) -> None:
    held = {"distill": {"weight": 1.0, "divergence": "whole"}}
    with pytest.raises(ConfigError, match="expected at least the 4 token ids of the policy, found 1; choose another"):
        prepare(config(teacher={"in_learner": "teachers!"}, objective=held), "train")


def test_a_training_run_serves_the_policy(checks: Checks) -> None:
    prepared = prepare(config(search={**MODELS, "fraction": 0.5}), "train")
    assert prepared.served is prepared.policy
    assert [engines.role for engines in prepared.auxiliary] == ["model", "reviewer"]


@pytest.mark.parametrize(("purpose", "trains"), [("train", True), ("check", True), ("search", False)])
def test_an_adapter_is_checked_and_planned_where_it_is_trained(
    checks: Checks, monkeypatch: pytest.MonkeyPatch, purpose: Purpose, trains: bool
) -> None:
    lora = LoraConfig(rank=2)
    adapter = AdapterSpec(lora=lora, base=Path("policy"), layers={"q": (3, 5)})
    checks.trained = 2 * (3 + 5) if trains else None
    monkeypatch.setattr(
        preflight, "check_adapter", lambda model, _lora: checks.done.append(("adapter", model)) or adapter
    )
    prepared = prepare(config(model={"path": "m", "lora": {"rank": 2}}), purpose)
    checked = [entry for entry in checks.done if entry[0] == "adapter"]
    assert checked == ([("adapter", prepared.policy)] if trains else [])
    if trains:
        assert prepared.trained_parameters == 16
        assert "model.lora: 16 trained parameters in 1 linear layers" in prepared.notes


@pytest.mark.parametrize(("stages", "prompts"), [(["online"], ()), (["search", "sft"], ["a prompt"])])
def test_the_stage_search_has_prompts(checks: Checks, stages: list[str], prompts: Any) -> None:
    assert prepare(config(stages=stages), "train").tree_prompts == prompts


@pytest.mark.parametrize("purpose", ["train", "search", "evaluate"])
def test_resources_beyond_this_machine_are_refused_before_the_data_are_read(checks: Checks, purpose: Purpose) -> None:
    checks.needs = [TOO_MUCH]
    with pytest.raises(ConfigError, match=r"^actors\.count: the run needs 2 GiB of memory, this machine has 1"):
        prepare(config(), purpose, ModelFolder(Path("e")))
    assert checks.done[-1][0] == "plan"


def test_check_shows_a_plan_that_does_not_fit(checks: Checks) -> None:
    checks.needs = [TOO_MUCH]
    assert [plan.needs for plan in prepare(config(), "check").plans] == [[TOO_MUCH]]


def test_only_a_training_run_needs_its_best_metric() -> None:
    bad = config(checkpoint={"best_metric": "held_out/none"})
    for purpose in ("train", "check"):
        with pytest.raises(ConfigError, match=r"^checkpoint\.best_metric: "):
            check_settings(bad, purpose)
    for purpose in ("evaluate", "search"):
        check_settings(bad, purpose)


@pytest.mark.parametrize("purpose", ["train", "check", "evaluate", "search"])
def test_every_command_refuses_an_unsafe_address(purpose: Purpose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "1")
    with pytest.raises(ConfigError, match=r"^run\.address local: "):
        check_settings(config(), purpose)


def test_a_folder_that_is_no_model_names_its_field(tmp_path: Path) -> None:
    search = {"reviewer": {**MODELS["reviewer"], "path": str(tmp_path)}}
    with pytest.raises(ConfigError, match=r"search\.reviewer\.path .*: the folder has no config\.json"):
        prepare(config(search=search, evaluation={"search_answers": 2}), "evaluate", ModelFolder(tmp_path))


@pytest.mark.heavy
def test_a_check_of_a_tiny_model_loads_neither_torch_nor_vllm(tmp_path: Path) -> None:
    """Their imports take longer than the whole check."""
    path = tmp_path / "config.yaml"
    path.write_text(f"run: {{dir: {tmp_path / 'run'}}}\nmodel: {{from_scratch: {{}}}}\ntask: {{type: letter_count}}\n")
    code = (
        f"import sys; from rlsys import cli; sys.argv = ['rlsys', 'check', {str(path)!r}]\n"
        "try:\n    cli.main()\n"
        "except SystemExit as end:\n"
        "    print('loaded', end.code, {'torch', 'vllm', 'ray', 'datasets', 'math_verify'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == "loaded 0 set()"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("purpose", ["train", "check", "search"])
def test_a_run_directory_on_a_cluster_is_absolute(purpose: Purpose, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("check_address", "check_answer"):
        monkeypatch.setattr(f"rlsys.launch.prepare.{name}", lambda _address: None)
    on_cluster = config(run={"dir": "runs/x", "address": "10.0.0.1:6379"})
    with pytest.raises(ConfigError, match=r"^run\.dir runs/x: expected an absolute path on a file system that all"):
        check_settings(on_cluster, purpose)
    check_settings(on_cluster, "evaluate")  # it writes nothing there
    check_settings(config(run={"dir": "/runs/x", "address": "10.0.0.1:6379"}), purpose)


def test_a_run_directory_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nothing")
    for name, kind in {"file": "no folder", "file/run": "no folder", "link": "a link to nothing"}.items():
        with pytest.raises(ConfigError, match=rf"^run\.dir .*{name}: expected a folder, but \S+ is {kind}; choose"):
            check_settings(config(run={"dir": str(tmp_path / name)}), "check")
    check_settings(config(run={"dir": str(tmp_path / "new" / "run")}), "check")
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(preflight.os, "access", lambda folder, _mode: folder != tmp_path)  # root may write anywhere
    with pytest.raises(ConfigError, match=rf"^run\.dir .* but {tmp_path} cannot; change its permissions"):
        check_settings(config(run={"dir": str(tmp_path / "new" / "run")}), "check")


@pytest.mark.parametrize("purpose", ["train", "check", "evaluate", "search"])
def test_functions_in_files_that_do_not_exist_are_refused_by_the_commands_that_call_them(purpose: Purpose) -> None:
    with pytest.raises(ConfigError, match=r"^rewards\.functions\.0\.fn 'none\.py:f': cannot import none\.py: no such"):
        check_settings(config(rewards={"functions": [{"fn": "none.py:f"}]}), purpose)
    learning = config(objective={"policy": {"estimator": "none.py:f"}})
    if purpose in ("evaluate", "search"):
        check_settings(learning, purpose)
        return
    with pytest.raises(ConfigError, match=r"^objective\.policy\.estimator 'none\.py:f': cannot import none\.py: no "):
        check_settings(learning, purpose)
