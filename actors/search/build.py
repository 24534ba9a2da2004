"""The forest of one rollout actor, from its settings: codecs, writers and their limits."""

from __future__ import annotations

from collections.abc import Mapping

from actors.search.scheduler import Forest, ForestSettings, ForestWriter, Verifier
from actors.search.writers import WriterEngine
from rlsys.config.patterns import resolve
from rlsys.config.schema import ActorsConfig, SamplingConfig
from rlsys.config.search import SearchConfig, SearchModelConfig
from rlsys.errors import ConfigError
from rlsys.models.folder import ModelFolder
from rlsys.search.codec import TagCodec
from rlsys.trees import Writer


def build_codec(model: ModelFolder, search: SearchConfig, section: SearchModelConfig | None = None) -> TagCodec:
    """Return the codec of a model for all tags of the search.

    Args:
        model: the model, whose tokenizer the codec uses.
        search: the section `search`, which names the tags.
        section: the section of another model than the policy, with its question template.
    """
    types = [node_type for pattern in resolve(search).values() for node_type in pattern.types.values()]
    return TagCodec(
        model.tokenizer,
        list(dict.fromkeys(node_type.tag for node_type in types)),
        model.end_token_ids,
        digest=model.tokenizer_digest,
        question_template=section.question_template if section else "{question}",
    )


def check_tags(search: SearchConfig, models: Mapping[Writer, ModelFolder]) -> None:
    """Raise ConfigError if the tokenizer of a model loses a tag of the search."""
    for writer, model in models.items():
        try:
            build_codec(model, search, model_settings(search, writer))
        except ConfigError as error:
            raise ConfigError(f"{error.message}; the model is {model.path}") from None


def model_settings(search: SearchConfig, writer: Writer) -> SearchModelConfig | None:
    """The section of a writer; None for the policy."""
    return {"policy": None, "model": search.model, "reviewer": search.reviewer}[writer]


def build_forest(
    own: Writer,
    engine: WriterEngine,
    model: ModelFolder,
    codec: TagCodec,
    others: Mapping[Writer, tuple[WriterEngine, ModelFolder]],
    rewards: Verifier,
    *,
    search: SearchConfig,
    sampling: SamplingConfig,
    actors: ActorsConfig,
    seed: int,
) -> Forest:
    """A forest that writes with the actor's own engine, and with others where the search has more models.

    Args:
        own: what the actor's own engine is to a tree; the policy leaves the growing to "model" where `others` has one.
        model, codec: the model of that engine, and its codec.
        others: engine and model of every other writer.
    """
    writers: dict[Writer, ForestWriter] = {}
    if own == "model" or "model" not in others:
        writers[own] = ForestWriter(engine=engine, model=model.digest, codec=codec, max_model_len=actors.max_model_len)
    for name, (other, other_model) in others.items():
        section = model_settings(search, name)
        assert section is not None  # noqa: S101 - only models of the section `search` are others
        writers[name] = ForestWriter(
            engine=other,
            model=other_model.digest,
            codec=build_codec(other_model, search, section),
            max_model_len=section.max_model_len,
        )
    settings = ForestSettings(
        config=search,
        patterns=resolve(search),
        seed=seed,
        temperature=search.temperature or sampling.temperature,
        top_p=search.top_p or sampling.top_p,
        max_chain_tokens=sampling.max_tokens,
        in_flight=_share_of_grower(search, actors, others),
    )
    return Forest(writers, rewards, settings)


def _share_of_grower(search: SearchConfig, actors: ActorsConfig, others: Mapping[Writer, object]) -> int:
    """Sequences that the engines which grow trees decode at once, for each of the actors that ask them."""
    if search.model is None or "model" not in others:
        return actors.max_num_seqs
    return max(1, search.model.max_num_seqs * search.model.count // actors.count)
