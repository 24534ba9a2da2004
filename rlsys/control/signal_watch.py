"""A warning in one line if the rewards of several steps in a row can teach the policy nothing."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

STEPS = 5
_BEFORE = "the stage warm_start or sft"
_NAMES = ("zero_advantage_groups", "truncated_rate", "no_answer_rate", "accuracy", "reward")


@dataclass(kw_only=True)
class SignalWatch:
    """Watches the sampled groups of the steps, and names the likely cause once for every cause.

    Attributes:
        say: takes the warning.
        max_tokens: sampling.max_tokens, for the message.
    """

    say: Callable[[str], None]
    max_tokens: int
    _steps: deque[Mapping[str, float]] = field(default_factory=lambda: deque(maxlen=STEPS))
    _said: set[str] = field(default_factory=set)

    def add(self, metrics: Mapping[str, float]) -> None:
        """Look at the metrics of a step, by names of `rlsys.run.metrics`. Steps without sampled groups say nothing."""
        if "rollout/zero_advantage_groups" not in metrics:
            return
        self._steps.append({name: metrics[f"rollout/{name}"] for name in _NAMES})
        if len(self._steps) < STEPS:
            return
        cause = self._cause()
        if cause:
            self._steps.clear()  # another cause needs as many steps of its own
        if cause and cause not in self._said:
            self._said.add(cause)
            self.say(f"NOTHING TO LEARN from the rewards of {STEPS} steps: {cause}")

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
