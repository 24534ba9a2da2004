"""Adapters of Ray handles: deadlines, errors and kills. Ray itself is not started."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import ray
from fakes import group, prompt
from ray.exceptions import ActorDiedError, ObjectLostError, OutOfMemoryError, RayTaskError, WorkerCrashedError

from rlsys.config.engine_roles import trees_ahead
from rlsys.config.files import parse_config
from rlsys.control.watchdog import WatchClock
from rlsys.errors import (
    CheckpointError,
    ConfigError,
    EngineError,
    InputError,
    LearnerLostError,
    NonFiniteLossError,
    ProcessDiedError,
    RaisedError,
    RlsysError,
)
from rlsys.interfaces import TokenValues
from rlsys.launch import remote
from rlsys.launch.remote import RayActor, RayLearner, RayRank, answer
from rlsys.launch.start import start_rank
from rlsys.ray_errors import death
from rlsys.trees import TreeFailure
from rlsys.types import RolloutFailure, SamplingSettings, TrainingBatch
from rlsys.weight_types import WeightOffer

CONFIG = parse_config({"run": {"dir": "d"}, "model": {"path": "m"}, "task": {"type": "letter_count"}}, "test")
SETTINGS = SamplingSettings(samples=1, temperature=1.0, top_p=1.0, max_tokens=4, seed=0)

# Recorded from Ray 2.60, paths shortened.
IN_INIT = """The actor died because of an error raised in its creation task, \
ray::RolloutActor.__init__() (pid=7, ip=127.0.0.1, actor_id=0a01, repr=<actors.rollout_actor.RolloutActor object>)
  File "actors/rollout_actor.py", line 52, in __init__
    self.engine = Engine(settings.model_path, settings.actors, settings.device, end_token_id(self.tokenizer))
                  ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  File "actors/engine.py", line 91, in __init__
    self._engine = _build(model_path, config, device)
                   ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
"""
KILLED = """The actor died unexpectedly before finishing this task.
\tclass_name: RolloutActor
\tactor_id: 0a01
\tpid: 7
\tip: 127.0.0.1
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: (1) ...
"""


def test_a_failed_init_tells_its_cause() -> None:
    error = death(IN_INIT + "ValueError: no kernel for head size 7\n", "actor 0")
    assert type(error) is RaisedError
    assert error.message == "actor 0 did not start: ValueError: no kernel for head size 7"


def test_an_error_of_rlsys_in_init_keeps_its_type() -> None:
    error = death(IN_INIT + "rlsys.errors.ConfigError: actors.dtype: bf16: not here\n", "actor 0")
    assert type(error) is ConfigError
    assert error.message == "actor 0: actors.dtype: bf16: not here"


def test_a_message_of_several_lines_becomes_one() -> None:
    error = death(IN_INIT + "torch.OutOfMemoryError: CUDA out of memory.\nTried to allocate 2 GiB.\n", "actor 0")
    assert error.message == (
        "actor 0 did not start: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB."
    )
    assert not isinstance(error, RaisedError)  # the memory may be free later


def test_a_killed_process() -> None:
    message = death(KILLED, "learner rank 1").message
    assert message.startswith("learner rank 1 died: The actor is dead because its worker process has died.")


class Reference:
    """A fake Ray reference that holds a value or an error."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def future(self) -> Future[Any]:
        future: Future[Any] = Future()
        if isinstance(self.value, BaseException):
            future.set_exception(self.value)
        else:
            future.set_result(self.value)
        return future


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ActorDiedError(), "actor 0 died: The actor died unexpectedly"),
        (ObjectLostError("ab", None, ""), "actor 0 failed: ObjectLostError: "),
    ],
)
def test_errors_of_ray_become_one_line_that_names_the_actor(error: Exception, expected: str) -> None:
    with pytest.raises(RlsysError) as caught:
        asyncio.run(answer(Reference(error), 1.0, "actor 0", "actors.start_timeout_s"))  # type: ignore[arg-type]
    assert caught.value.message.startswith(expected) and "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("cause", "kind"),
    [
        (IndexError("out of range"), RaisedError),
        (RuntimeError("CUDA out of memory"), EngineError),
        (InputError("x"), InputError),
    ],
)
def test_an_exception_of_a_living_process_says_whether_it_would_come_again(
    cause: Exception, kind: type[RlsysError]
) -> None:
    with pytest.raises(RlsysError) as caught:
        asyncio.run(answer(Reference(RayTaskError("train", "traceback", cause)), 1.0, "rank 0", "f"))  # type: ignore[arg-type]
    assert type(caught.value) is kind


class Handle:
    """A fake Ray actor that gives the same answer to every call."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __getattr__(self, name: str) -> Handle:
        return self

    def remote(self, *arguments: Any) -> Reference:
        return Reference(self.value)


def test_groups_come_back_as_the_actor_gave_them() -> None:
    groups = [group(prompt("a")), RolloutFailure(prompt=prompt("b"), reason="too long")]
    actor = RayActor(Handle(groups), CONFIG, "actor 0")
    assert asyncio.run(actor.generate([prompt("a"), prompt("b")], SETTINGS)) is groups
    assert asyncio.run(RayActor(Handle(groups[1]), CONFIG, "actor 1").search(prompt("b"))) is groups[1]
    failure = TreeFailure(prompt_id="p", question="q", answer="a", reason="no room")
    assert asyncio.run(RayActor(Handle(failure), CONFIG, "actor 0").grow(prompt("p"))) is failure


def test_trees_of_training_wait_for_their_turn_before_their_deadline_runs() -> None:
    """Of 12 prompts an actor gets as many at once as fill its engine, at least 8. The others wait in the driver."""
    calls: list[Future[Any]] = []

    class Slow(Handle):
        def remote(self, *arguments: Any) -> Any:
            calls.append(Future())
            return type("Pending", (), {"future": lambda _, call=calls[-1]: call})()

    async def main() -> None:
        small = CONFIG.model_copy(update={"actors": CONFIG.actors.model_copy(update={"max_num_seqs": 1})})
        actor = RayActor(Slow(None), small, "actor 0")
        searches = [asyncio.create_task(actor.search(prompt(f"{number}"))) for number in range(12)]
        await asyncio.sleep(0.01)
        assert len(calls) == trees_ahead(small) == 8
        while not all(search.done() for search in searches):
            for call in [call for call in calls if not call.done()]:
                call.set_result(None)
            await asyncio.sleep(0.001)

    asyncio.run(main())
    assert len(calls) == 12


class Silent(Handle):
    def remote(self, *arguments: Any) -> Any:
        return type("Pending", (), {"future": lambda _: Future()})()


def test_an_actor_that_does_not_take_a_publish_in_time_is_named() -> None:
    config = CONFIG.model_copy(update={"weight_sync": CONFIG.weight_sync.model_copy(update={"timeout_s": 0.02})})
    offer = WeightOffer(version=5, attempt=0, source=None)
    update = RayActor(Silent(None), config, "actor 1").update_weights(offer, ())
    with pytest.raises(EngineError, match=r"actor 1 did not answer within weight_sync\.timeout_s = 0\.02 s"):
        asyncio.run(update)


def test_a_stopped_process_is_killed_although_ray_cannot_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[Any] = []
    monkeypatch.setattr(ray, "kill", killed.append)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "ray::Test"]) as process:
        handle = Handle((socket.gethostname(), process.pid))
        actor = RayActor(handle, CONFIG, "actor 0")
        asyncio.run(actor.start())
        process.send_signal(signal.SIGSTOP)
        actor.kill()
        assert process.wait(10) == -signal.SIGKILL
        actor.kill()  # of a process that is gone
    assert killed == [handle, handle]


def test_a_process_is_killed_even_if_ray_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(handle: Any) -> None:
        raise RuntimeError("Ray is not there")

    monkeypatch.setattr(ray, "kill", kill)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "ray::Test"]) as process:
        actor = RayActor(Handle((socket.gethostname(), process.pid)), CONFIG, "actor 0")
        asyncio.run(actor.start())
        with pytest.raises(RuntimeError, match="Ray is not there"):
            actor.kill()
        try:
            assert process.wait(10) == -signal.SIGKILL
        finally:
            process.kill()


def test_a_process_on_another_host_is_left_to_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[Any] = []
    monkeypatch.setattr(ray, "kill", killed.append)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "ray::Test"]) as process:
        actor = RayActor(Handle(("elsewhere", process.pid)), CONFIG, "actor 0")
        asyncio.run(actor.start())
        actor.kill()
        assert len(killed) == 1 and process.poll() is None
        process.kill()


@pytest.mark.parametrize("acknowledged", [True, False])
def test_an_actor_that_has_closed_is_ended_by_ray(monkeypatch: pytest.MonkeyPatch, acknowledged: bool) -> None:
    killed: list[Any] = []
    monkeypatch.setattr(ray, "kill", killed.append)
    handle = Handle(None if acknowledged else ActorDiedError())
    closing = RayActor(handle, CONFIG, "actor 0").close()
    if acknowledged:
        asyncio.run(closing)
    else:
        with pytest.raises(ProcessDiedError, match="actor 0 died"):
            asyncio.run(closing)
    assert killed == [handle] * acknowledged


class Rank:
    """The Ray handle of a learner rank, with one answer for every method."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.arguments: dict[str, tuple[Any, ...]] = {}

    def __getattr__(self, name: str) -> Any:
        def remote(*arguments: Any) -> Any:
            self.arguments[name] = arguments
            value = self.answers.get(name, 3 if name == "progress" else None)
            return type("Pending", (), {"future": lambda _: value})() if isinstance(value, Future) else Reference(value)

        return type("Method", (), {"remote": staticmethod(remote)})()


def test_calls_of_a_rank_carry_no_order_and_nothing_cancels_a_call_that_ray_may_not_have_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: dict[str, Any] = {}

    class Kind:
        def options(self, **options: Any) -> Kind:
            given.update(options)
            return self

        def remote(self, *_arguments: Any) -> None: ...

    monkeypatch.setattr(ray, "remote", lambda **_options: lambda _kind: Kind())
    start_rank(object, {"num_cpus": 1})
    assert given["allow_out_of_order_execution"] is True

    monkeypatch.setattr(ray, "cancel", lambda *_: pytest.fail("a call was cancelled"))
    silent = RayRank(Rank(progress=Future(), train=Future()), CONFIG, "learner rank 0")

    async def cancelled(call: Any) -> None:
        task = asyncio.ensure_future(call)
        await asyncio.sleep(0.01)
        task.cancel()
        assert isinstance((await asyncio.gather(task, return_exceptions=True))[0], asyncio.CancelledError)

    asyncio.run(cancelled(silent.progress(5.0)))
    asyncio.run(cancelled(silent.call("train")))


def learner_of(*ranks: Rank, **settings: float) -> RayLearner:
    config = CONFIG.model_copy(update={"learner": CONFIG.learner.model_copy(update=settings)})
    return RayLearner(lambda attempt: ranks, config, WatchClock(interval_s=0.005))


@pytest.fixture
def no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "put", lambda value: value)


@pytest.mark.usefixtures("no_store")
def test_a_training_step_goes_to_every_rank_and_the_first_answers() -> None:
    ranks = [Rank(train={"rank": 0.0}), Rank(train={"rank": 1.0})]
    batch = TrainingBatch()
    assert asyncio.run(learner_of(*ranks).train(batch, 4, 5)) == {"rank": 0.0}
    assert [rank.arguments["train"] for rank in ranks] == [(batch, 4, 5)] * 2


def test_values_of_tokens_come_from_the_rank_that_has_the_row() -> None:
    own, other, both = (TokenValues(untrained=word) for word in ("own", "other", "both"))
    ranks = [Rank(token_values=[own, None, both]), Rank(token_values=[None, other, both])]
    assert asyncio.run(learner_of(*ranks).token_values()) == [own, other, both]


@pytest.mark.usefixtures("no_store")
@pytest.mark.parametrize("kind", [NonFiniteLossError, CheckpointError, ConfigError])
def test_an_error_of_rlsys_on_all_ranks_stays_what_it_is(kind: type[RlsysError]) -> None:
    error = RayTaskError("train", "traceback", kind("loss nan"))
    with pytest.raises(kind, match="loss nan"):
        asyncio.run(learner_of(Rank(train=error), Rank(train=error)).train(TrainingBatch(), 0, 1))


@pytest.mark.usefixtures("no_store")
def test_a_rank_that_does_not_report_progress_is_a_lost_learner() -> None:
    stopped = Rank(save=Future(), progress=Future())
    with pytest.raises(LearnerLostError, match=r"rank 0 made no progress within learner.hang_timeout_s = 0.05 s"):
        asyncio.run(learner_of(stopped, hang_timeout_s=0.05).save(Path("folder")))


@pytest.mark.usefixtures("no_store")
def test_a_rank_that_does_not_answer_in_time_is_a_lost_learner() -> None:
    silent = Rank(save=Future())
    with pytest.raises(LearnerLostError, match=r"^learner rank 0 did not answer within learner.timeout_s = 0.05 s"):
        asyncio.run(learner_of(silent, timeout_s=0.05).save(Path("folder")))


def test_a_rank_that_does_not_start_in_time_is_a_lost_learner() -> None:
    learner = learner_of(Rank(place=Future()), start_timeout_s=0.05)
    with pytest.raises(LearnerLostError, match=r"did not answer within learner.start_timeout_s = 0.05 s"):
        asyncio.run(learner.start_stage("online", Path("policy"), None, None))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OutOfMemoryError("killed"), "out of memory (lower actors.kv_cache_gib, learner.micro_batch_tokens"),
        (WorkerCrashedError(), "WorkerCrashedError"),
        (ActorDiedError(), "The actor died unexpectedly"),
    ],
)
@pytest.mark.usefixtures("no_store")
def test_a_death_is_reported_before_the_errors_that_follow_from_it(error: Exception, words: str) -> None:
    broken = RayTaskError("train", "traceback", RuntimeError("Connection closed by peer"))
    with pytest.raises(LearnerLostError) as caught:
        asyncio.run(learner_of(Rank(train=broken), Rank(train=error)).train(TrainingBatch(), 0, 1))
    assert caught.value.message.startswith("learner rank 1 died: ") and words in caught.value.message


def test_a_stopped_rank_is_killed_by_a_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "kill", lambda handle: None)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "ray::Test"]) as process:
        rank = Rank(place=(socket.gethostname(), process.pid))

        async def main() -> None:
            learner = learner_of(rank)
            await learner.start_stage("warm_start", Path("policy"), None, None)
            process.send_signal(signal.SIGSTOP)
            rank.answers["place"] = Future()  # a stopped process answers nothing
            await asyncio.wait_for(learner.restart(), 2)

        asyncio.run(main())
        assert process.wait(10) == -signal.SIGKILL


def test_a_process_that_does_not_belong_to_ray_is_never_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        assert remote.process_at(socket.gethostname(), process.pid) is None
        process.kill()


def test_closing_the_learner_ends_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[Any] = []
    monkeypatch.setattr(ray, "kill", killed.append)
    ranks = [Rank(), Rank()]
    RayLearner(lambda _attempt: ranks, CONFIG).close()
    assert killed == ranks
