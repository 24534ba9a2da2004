"""docs/keys.md: every key of a config file, from the schema. `make docs` writes it."""

from __future__ import annotations

from itertools import groupby

from rlsys.config.keys import Key, all_keys


def page() -> str:
    """Return the page as Markdown."""
    lines = [
        "# Keys of a config file",
        "",
        "Made from the schema in `rlsys/config/` by `make docs`; `rlsys keys SECTION` prints the same. A dotted name "
        "is a key inside of sections: `train.max_steps` is `max_steps` in the section `train`, and "
        "`train.max_steps=20` sets it on the command line. NAME and NUMBER stand for the name and the index of an "
        "entry that you add. A key that is listed more than once belongs to several alternatives of its section.",
    ]
    for section, keys in groupby(all_keys(), key=lambda key: key.name.split(".")[0]):
        lines += ["", f"## {section}", "", "| key | value | default | meaning |", "|---|---|---|---|"]
        lines += map(_row, keys)
    return "\n".join(lines) + "\n"


def _row(key: Key) -> str:
    return f"| `{key.name}` | {_cell(key.type)} | {_cell(f'`{key.default}`')} | {_cell(key.meaning)} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    print(page(), end="")
