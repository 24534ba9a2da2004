"""Options and settings of all tests."""

from __future__ import annotations

import multiprocessing.process
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# A machine that is busy with something else is not a failure.
hypothesis.settings.register_profile("rlsys", deadline=None)
hypothesis.settings.register_profile("fast", deadline=None, max_examples=10)
hypothesis.settings.load_profile("rlsys")

HERE = Path(__file__).parent
# Files and folders whose tests load torch or transformers, start processes, or take long. `make test-fast` leaves
# them out.
HEAVY = {
    "actors/search/test_scheduled_values.py",
    "actors/search/test_scheduler.py",
    "actors/test_engine.py",
    "actors/test_engine_build.py",
    "actors/test_model_actor.py",
    "actors/test_rollout_actor.py",
    "actors/test_teacher.py",
    "actors/test_weights.py",
    "actors/verifiers",
    "integration",
    "learners/deepspeed/test_collective_errors.py",
    "learners/deepspeed/test_critic.py",
    "learners/deepspeed/test_model.py",
    "learners/deepspeed/test_parameters.py",
    "learners/deepspeed/test_reference.py",
    "learners/deepspeed/test_rollback.py",
    "learners/deepspeed/test_sequence_check.py",
    "learners/deepspeed/test_tensor_files.py",
    "learners/objective/test_curiosity.py",
    "learners/objective/test_distillation.py",
    "learners/objective/test_joint.py",
    "learners/objective/test_joint_terms.py",
    "learners/objective/test_logprobs.py",
    "learners/objective/test_losses.py",
    "learners/objective/test_losses_kl_value.py",
    "learners/objective/test_losses_ratios.py",
    "learners/objective/test_losses_sums.py",
    "learners/objective/test_preferences.py",
    "learners/objective/test_ranking.py",
    "learners/objective/test_token_selection.py",
    "learners/objective/test_trl_parity.py",
    "learners/samples/test_batching.py",
    "learners/samples/test_build.py",
    "learners/samples/test_masking.py",
    "learners/samples/test_packing.py",
    "learners/samples/test_policy.py",
    "learners/test_attention.py",
    "learners/test_cpu_products.py",
    "learners/test_distilled_rows.py",
    "learners/test_distilled_steps.py",
    "learners/test_forward.py",
    "learners/test_language_model.py",
    "learners/test_learner_actor.py",
    "learners/test_masked_turns.py",
    "learners/test_plugins.py",
    "learners/test_rank.py",
    "learners/test_scoring.py",
    "learners/test_small_model.py",
    "learners/test_step_metrics.py",
    "learners/test_token_values.py",
    "learners/test_training_step.py",
    "learners/test_whole_teacher.py",
    "peers",
    "rlsys/commands/test_check.py",
    "rlsys/commands/test_check_demonstrations.py",
    "rlsys/commands/test_check_examples.py",
    "rlsys/commands/test_check_trials.py",
    "rlsys/commands/test_evaluate.py",
    "rlsys/commands/test_export.py",
    "rlsys/commands/test_extract.py",
    "rlsys/commands/test_score.py",
    "rlsys/commands/test_search.py",
    "rlsys/commands/test_search_command.py",
    "rlsys/control/stages/test_search.py",
    "rlsys/control/test_supervisor.py",
    "rlsys/data/test_inputs.py",
    "rlsys/launch/test_access.py",
    "rlsys/launch/test_cluster_examples.py",
    "rlsys/launch/test_leftovers.py",
    "rlsys/launch/test_ray_cluster.py",
    "rlsys/launch/test_ray_log.py",
    "rlsys/launch/test_remote.py",
    "rlsys/launch/test_session.py",
    "rlsys/launch/test_start.py",
    "rlsys/models",
    "rlsys/run/test_checkpoint_kills.py",
    "rlsys/run/test_lock.py",
    "rlsys/search/test_trl_tables.py",
    "rlsys/tasks/test_ifeval.py",
    "rlsys/tasks/test_multi_if.py",
    "rlsys/tasks/test_reasoning_gym.py",
    "rlsys/test_cli.py",
    "rlsys/test_processes.py",
    "rlsys/transfer/test_bucket_memory.py",
    "rlsys/transfer/test_object_store.py",
    "rlsys/transfer/test_transports.py",
    "rlsys/transfer/test_wire.py",
    "test_examples.py",
    "test_layers.py",
    "test_planted_pickles.py",
    "test_security.py",
}
# Integration tests that share no run. All others of that folder stay in one worker, where they share one. They take
# longest, so whatever can run beside them is named here.
ALONE = {
    "test_bad_resume_cli",
    "test_bf16_publishes",
    "test_engine_weights",
    "test_gradient_sums",
    "test_learner_ranks",
    "test_lora_engine",
    "test_lora_ranks",
    "test_partitioned_models",
    "test_shipped_configs",
}
FRAMEWORKS = {"torch", "ray", "vllm", "deepspeed"}
blamed: set[str] = set()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="only tests without torch and without processes")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--fast"):
        hypothesis.settings.load_profile("fast")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if config.getoption("--fast") and collection_path.is_relative_to(HERE):
        name = collection_path.relative_to(HERE).as_posix()
        return True if name in HEAVY else None
    return None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each worker whole files, with `--dist loadscope`. (Marks of xdist_group do not reach pytest 9's ids.)"""
    if config.getvalue("dist") != "loadscope":
        return None
    config.option.loadscopereorder = False  # it would begin with the most tests, and end with the longest
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = Path(nodeid.partition("::")[0])
            return "runs" if path.parent.name == "integration" and path.stem not in ALONE else str(path)

    return Files(config, log)


def is_heavy(item: pytest.Item) -> bool:
    name = item.path.as_posix().removeprefix(f"{HERE.as_posix()}/")
    return item.get_closest_marker("heavy") is not None or name.startswith(tuple(HEAVY))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the long tests first, so that no worker waits for another at the end."""
    items.sort(key=lambda item: 0 if item.path.parent.name == "integration" else 1 if is_heavy(item) else 2)
    if config.getoption("--fast"):
        heavy = [item for item in items if is_heavy(item)]
        items[:] = [item for item in items if item not in heavy]
        config.hook.pytest_deselected(items=heavy)


@pytest.fixture(autouse=True)
def keep_fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail a test of `make test-fast` that starts a process or loads a framework."""
    if not request.config.getoption("--fast"):
        yield
        return

    def refuse(*arguments: object, **_options: object) -> None:
        pytest.fail(f"a fast test starts a process: {arguments}; mark it heavy, or add its file to HEAVY")

    for module, name in ((subprocess, "Popen"), (os, "fork"), (multiprocessing.process.BaseProcess, "start")):
        monkeypatch.setattr(module, name, refuse)
    yield
    new = FRAMEWORKS & sys.modules.keys() - blamed
    blamed.update(new)
    assert not new, f"the fast tests load {', '.join(sorted(new))} here; mark this test heavy, or mend its imports"
