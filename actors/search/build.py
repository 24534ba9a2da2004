"""Construction of a rollout actor's tree scheduler from the actor's settings."""

from __future__ import annotations

from collections.abc import Mapping

from actors.search.engines import CompletionEngine
from actors.search.requests import proposing_role
from actors.search.scheduler import TreeScheduler, Valuer
from actors.search.starting import RoleEngine, SchedulerSettings
from actors.search.turns import SearchedEnvironment
from actors.search.values.deadline import TimedValuer
from actors.search.values.function import FunctionValuer
from actors.search.values.judge import JudgeValuer, ScoringEngine
from actors.search.values.rollouts import RolloutValuer
from actors.search.values.steps import StepValuer
from actors.settings import ActorSettings
from actors.verifiers.pool import RewardPool
from rlsys.config.patterns import resolve
from rlsys.config.schema import ActorsConfig
from rlsys.config.search import SearchConfig, SearchModelConfig
from rlsys.config.search_values import FunctionValueConfig, ModelValueConfig, RolloutsValueConfig, StepsValueConfig
from rlsys.errors import ConfigError
from rlsys.models.chat import CheckedEncoder
from rlsys.models.folder import ModelFolder
from rlsys.models.turns import TurnEncoder
from rlsys.search.codec import TagCodec
from rlsys.tasks import tags
from rlsys.trees import Role


def build_codec(model: ModelFolder, search: SearchConfig, role: Role) -> TagCodec:
    """Return the codec of a model for all tags of the search, with the question template of its role."""
    types = [node_type for pattern in resolve(search).values() for node_type in pattern.types.values()]
    section = _section(search, role)
    return TagCodec(
        model.tokenizer,
        list(dict.fromkeys(node_type.tag for node_type in types)),
        model.end_token_ids,
        digest=model.tokenizer_digest,
        question_template=section.question_template if section else "{question}",
    )


def check_tags(search: SearchConfig, models: Mapping[Role, ModelFolder]) -> None:
    """Check that all models can read the tags and prefixes of the search, and that their tokenizers keep the tags.

    Raises:
        ConfigError: A tokenizer changes a tag, or a tag or prefix needs a token that the model does not have. Or steps
            are checked, and a tag is unknown to the tasks.
    """
    types = [node_type for pattern in resolve(search).values() for node_type in pattern.types.values()]
    unknown = next((node_type.tag for node_type in types if node_type.tag not in tags.TAGS), None)
    if isinstance(search.value, StepsValueConfig) and unknown is not None:
        raise ConfigError(
            f"search.value {{type: steps}}: expected the tags that tasks check ({', '.join(tags.TAGS)}), found "
            f"<{unknown}>; change the tag in search.nodes, or choose another type of value"
        )
    prefixes = [prefix for node_type in types for prefix in node_type.prefixes]
    for role, model in models.items():
        try:
            codec, encoder = build_codec(model, search, role), CheckedEncoder(model.tokenizer, model.vocabulary)
            for text in (*codec.tags, *prefixes):
                encoder.text(text)
        except ConfigError as error:
            raise ConfigError(f"{error.message}; the model is {model.path}") from None


def build_scheduler(
    settings: ActorSettings,
    search: SearchConfig,
    own_model: ModelFolder,
    codec: TagCodec,
    engines: Mapping[Role, CompletionEngine],
    verifier: RewardPool,
    judge: ScoringEngine | None = None,
) -> TreeScheduler:
    """Return the tree scheduler of an actor.

    Args:
        own_model: Model of the actor's own engine.
        codec: Codec of the actor's own engine.
        engines: Engines of all roles, the actor's own included. With an engine of the role "model", the policy's
            engine is not used.
        judge: Engines of the judge; None if `search.value` names none.
    """
    role_engines: dict[Role, RoleEngine] = {}
    for role, engine in engines.items():
        section = _section(search, role)
        if role == "policy" and "model" in engines:
            continue
        if role == settings.role:
            model, max_model_len = own_model, settings.actors.max_model_len
        else:
            assert section is not None  # noqa: S101 - only the policy has no section
            model, max_model_len = ModelFolder(settings.auxiliary_paths[role]), section.max_model_len
        role_engines[role] = RoleEngine(
            engine=engine,
            model=model.digest,
            codec=codec if role == settings.role else build_codec(model, search, role),
            max_model_len=max_model_len,
        )
    scheduler_settings = SchedulerSettings(
        config=search,
        patterns=resolve(search),
        seed=settings.seed,
        temperature=search.temperature or settings.sampling.temperature,
        top_p=search.top_p or settings.sampling.top_p,
        max_chain_tokens=settings.sampling.max_tokens,
        in_flight=_share_of_proposer(search, settings.actors, settings.auxiliary_paths),
        environment=_searched_environment(settings, own_model),
    )
    proposer = role_engines[proposing_role(role_engines)]
    valuer = _valuer(settings, search, proposer, judge, verifier, scheduler_settings)
    return TreeScheduler(role_engines, verifier, scheduler_settings, valuer)


def _valuer(
    settings: ActorSettings,
    search: SearchConfig,
    proposer: RoleEngine,
    judge: ScoringEngine | None,
    verifier: RewardPool,
    drawing: SchedulerSettings,
) -> Valuer | None:
    """Return the source of the values that `search.value` names; None without one."""
    if isinstance(search.value, StepsValueConfig):
        return StepValuer(verifier)
    if isinstance(search.value, RolloutsValueConfig):
        rollouts = RolloutValuer(
            engine=proposer.engine,
            verifier=verifier,
            codec=proposer.codec,
            temperature=drawing.temperature,
            top_p=drawing.top_p,
        )
        return TimedValuer(rollouts, search.value.timeout_s)
    if isinstance(search.value, FunctionValueConfig):
        return FunctionValuer(verifier)
    if isinstance(search.value, ModelValueConfig):
        assert judge is not None  # noqa: S101 - the config names it
        valuer = JudgeValuer(judge, ModelFolder(settings.auxiliary_paths["judge"]), search.value)
        return TimedValuer(valuer, search.value.timeout_s)
    return None


def _searched_environment(settings: ActorSettings, policy: ModelFolder) -> SearchedEnvironment | None:
    """Return the environment in use; None without one."""
    if settings.environment is None:
        return None
    return SearchedEnvironment(settings.environment, TurnEncoder(policy.tokenizer, settings.environment.role).reply)


def _section(search: SearchConfig, role: Role) -> SearchModelConfig | None:
    """Return the config section of a role that writes nodes; None for the policy."""
    return {"model": search.model, "reviewer": search.reviewer}.get(role)


def _share_of_proposer(search: SearchConfig, actors: ActorsConfig, auxiliary: Mapping[Role, object]) -> int:
    """Return the number of sequences that the proposing engines decode at once, per actor."""
    if search.model is None or "model" not in auxiliary:
        return actors.max_num_seqs
    return max(1, search.model.max_num_seqs * search.model.count // actors.count)
