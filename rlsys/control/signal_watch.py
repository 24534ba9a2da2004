"""Warnings in one line: rewards of several steps teach the policy nothing, or it never asks its environment."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from rlsys.config.environment import active_environment
from rlsys.config.schema import Config

STEPS = 5
_BEFORE = "the stage warm_start or sft"
_NAMES = ("zero_advantage_groups", "truncated_rate", "no_answer_rate", "accuracy", "reward")


@dataclass(kw_only=True)
class SignalWatch:
    """Watches the sampled groups of the steps, and names the likely cause once for every cause.

    Attributes:
        say: takes the warning.
        max_tokens: sampling.max_tokens, for the message.
        stops: strings that end a turn of an environment in use; none without one, or with messages as replies.
    """

    say: Callable[[str], None]
    max_tokens: int
    stops: Sequence[str] = ()
    _seen_turns: bool = False
    _steps: deque[Mapping[str, float]] = field(default_factory=lambda: deque(maxlen=STEPS))
    _said: set[str] = field(default_factory=set)

    def add(self, metrics: Mapping[str, float]) -> None:
        """Look at the metrics of a step, by names of `rlsys.run.metrics`. Steps without sampled groups say nothing."""
        if "rollout/zero_advantage_groups" not in metrics:
            return
        self._watch_turns(metrics.get("rollout/turns"))
        self._steps.append({name: metrics[f"rollout/{name}"] for name in _NAMES})
        if len(self._steps) < STEPS:
            return
        cause = self._cause()
        if cause:
            self._steps.clear()  # another cause needs as many steps of its own
        if cause and cause not in self._said:
            self._said.add(cause)
            self.say(f"NOTHING TO LEARN from the rewards of {STEPS} steps: {cause}")

    def _watch_turns(self, turns: float | None) -> None:
        """Say if all episodes of the first step with episodes had a single turn."""
        if turns is None or self._seen_turns:
            return
        self._seen_turns = True
        if turns <= 1 and self.stops:
            ends = " or ".join(map(repr, self.stops))
            self.say(
                f"ONE TURN IN EVERY EPISODE of the first step: no turn ended with {ends} (environment.stop) and went "
                f"on; begin with {_BEFORE}, or ask for it in task.prompt_template"
            )

    def _cause(self) -> str:
        """Return the likely cause and the key to change; "" if a reward differs from others of its group."""
        if not self._always("zero_advantage_groups"):
            return ""
        if self._always("truncated_rate"):
            return (
                f"all completions are cut off: raise sampling.max_tokens ({self.max_tokens}), or begin with {_BEFORE}"
            )
        if self._always("no_answer_rate"):
            return f"no completion has an answer: ask for its form in task.prompt_template, or begin with {_BEFORE}"
        if self._always("accuracy"):
            return "all answers are right: take harder prompts, or stop"
        if all(step["accuracy"] == 0 for step in self._steps):
            return f"no answer is right: begin with {_BEFORE}, take easier prompts, or raise train.group_size"
        return (
            "the rewards of each group are equal: raise sampling.temperature, train.group_size or "
            "train.dynamic_sampling_rounds"
        )

    def _always(self, name: str) -> bool:
        return all(step[name] == 1 for step in self._steps)


def signal_watch(config: Config, say: Callable[[str], None]) -> SignalWatch:
    """Return the watch of a run, with the stop strings of its environment."""
    environment = active_environment(config.environment, config.task)
    stops = environment.stop if environment else ()
    return SignalWatch(say=say, max_tokens=config.sampling.max_tokens, stops=stops)
