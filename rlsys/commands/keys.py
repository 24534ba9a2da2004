"""`rlsys keys`: show the keys of a config file."""

from __future__ import annotations

from rlsys.config.keys import all_keys, suggestion
from rlsys.display import print_table, standard_output
from rlsys.errors import ConfigError


def run(section: str) -> None:
    """Print every key with its type, default and meaning.

    Args:
        section: show only this section or key; "" shows all.

    Raises:
        ConfigError: there is no such section or key.
    """
    rows = [
        (key.name, key.type, key.default, key.meaning)
        for key in all_keys()
        if not section or key.name == section or key.name.startswith(f"{section}.")
    ]
    if not rows:
        raise ConfigError(f"{section}: no such section or key; {suggestion(section)}")
    print_table(standard_output(), ("key", "type", "default", "meaning"), rows, below=True)
