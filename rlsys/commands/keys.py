"""`rlsys keys`: show the keys of a config file."""

from __future__ import annotations

from collections.abc import Sequence

from rlsys.config.keys import Key, all_keys, suggestion
from rlsys.display import print_table, standard_output
from rlsys.errors import ConfigError


def run(names: Sequence[str]) -> None:
    """Print keys with their types, defaults and meanings.

    Args:
        names: show only these sections or keys; empty shows all.

    Raises:
        ConfigError: there is no such section or key.
    """
    keys = all_keys()
    for name in names:
        if not _chosen(keys, name):
            raise ConfigError(f"{name}: no such section or key; {_advice(keys, name)}")
    chosen = [key for name in names for key in _chosen(keys, name)] if names else keys
    rows = [(key.name, key.type, key.default, key.meaning) for key in dict.fromkeys(chosen)]
    print_table(standard_output(), ("key", "type", "default", "meaning"), rows, below=True)


def _chosen(keys: Sequence[Key], name: str) -> list[Key]:
    return [key for key in keys if key.name == name or key.name.startswith(f"{name}.")]


def _advice(keys: Sequence[Key], name: str) -> str:
    """Return the sections that a name may mean, or all sections of the file."""
    inner = sorted({key.name.rpartition(".")[0] for key in keys if f".{name}." in f".{key.name}"})
    sections = [f"{each}.{name}" if not each.endswith(name) else each for each in inner]
    if sections:
        return f"did you mean {' or '.join(sections)}? `rlsys keys` shows all"
    top = ", ".join(dict.fromkeys(key.name.partition(".")[0] for key in keys))
    return f"{suggestion(name)}; the sections are {top}"
