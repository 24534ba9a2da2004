"""Start of a tree search for a prompt, with the models of all roles."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from actors.rollouts.multi_turn import environment_failure
from actors.rollouts.seeds import sample_seed
from actors.search.engines import CompletionEngine
from actors.search.mcts import TreeSearch
from actors.search.requests import SearchModel
from actors.search.turns import SearchedEnvironment
from rlsys.config.patterns import Pattern
from rlsys.config.search import SearchConfig
from rlsys.errors import DataError
from rlsys.interfaces import Reply
from rlsys.models.turns import opening_ids
from rlsys.search.codec import TagCodec
from rlsys.trees import Role
from rlsys.types import Prompt, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleEngine:
    """The engine or engines of a role.

    Attributes:
        model: Digest of the model.
        max_model_len: Longest context in tokens, prompt included.
    """

    engine: CompletionEngine
    model: str
    codec: TagCodec
    max_model_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSettings:
    """Settings that all trees share.

    Attributes:
        in_flight: Number of open requests below which another tree is admitted.
        environment: Answers the turns of the policy; None without one.
    """

    config: SearchConfig
    patterns: Mapping[str, Pattern]
    seed: int
    temperature: float
    top_p: float
    max_chain_tokens: int
    in_flight: int
    environment: SearchedEnvironment | None = None


class TreeStarter:
    """Maker of the searches of an actor."""

    def __init__(self, engines: Mapping[Role, RoleEngine], settings: SchedulerSettings) -> None:
        self._engines, self._settings = engines, settings

    def search(self, prompt: Prompt, opening: Reply | Verdict) -> TreeSearch | str:
        """Return the search of a prompt, or the reason why there can be none.

        Args:
            opening: Text of the environment before the first turn, which follows the prompt; a verdict if it failed.
        """
        if isinstance(opening, Verdict):
            return environment_failure(opening).detail
        try:
            models = {role: self._model(role, prompt, opening.text) for role in self._engines}
        except DataError as error:
            return f"environment: {error.message}"
        for role, model in models.items():
            if len(model.prompt_ids) >= model.max_model_len:
                limit = f"{_limit(role)} {model.max_model_len}"
                return f"the prompt has {len(model.prompt_ids)} tokens; {limit} leaves no room for a node"
        settings = self._settings
        rng = random.Random(sample_seed(settings.seed, prompt.prompt_id, "pattern"))
        return TreeSearch(
            prompt,
            settings.patterns[rng.choice(settings.config.patterns)],
            settings.config,
            models,
            max_chain_tokens=settings.max_chain_tokens,
            seed=settings.seed,
            environment=settings.environment,
        )

    def _model(self, role: Role, prompt: Prompt, opening: str) -> SearchModel:
        engine = self._engines[role]
        ids = prompt.token_ids.tolist() if role == "policy" else engine.codec.prompt(prompt.question)
        if opening and (environment := self._settings.environment) is not None:
            limits = environment.config.role, len(ids), engine.max_model_len, _limit(role)
            ids = [*ids, *opening_ids(opening, environment.encode, *limits)]
        return SearchModel(
            model=engine.model, codec=engine.codec, prompt_ids=tuple(ids), max_model_len=engine.max_model_len
        )


def _limit(role: Role) -> str:
    """Return the config field of the longest context of a role."""
    return "actors.max_model_len" if role == "policy" else f"search.{role}.max_model_len"
