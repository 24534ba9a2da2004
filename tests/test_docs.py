"""The pages agree with the repository: links, files, commands, options, keys, and which commands a test runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main
import yaml
from minimal_config import minimal
from page_commands import NOT_RUN, RUNS, reason_not_to_run, run_of
from pages import PAGES, ROOT, Block, all_blocks, blocks, read_page, spans, unprinted_lines

from rlsys.cli import app
from rlsys.config.files import apply_override, load_config, parse_config
from rlsys.config.keys import all_keys
from rlsys.config.schema import Config

LINKED = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
PATH = re.compile(r"(?:actors|benchmarks|configs|docs|learners|rlsys|tests)/[\w./-]+\.(?:py|yaml|md|sh|jsonl)")
NO_FILES = {"rlsys/tasks/parity.py", "benchmarks/NAME.py"}
"""Files that a page tells a reader to write, and names that stand for others."""
TEXT_COMMAND = re.compile(r"^\$? ?(?:rlsys (?!  )|make |python |pip |ray |vllm |hf )", re.MULTILINE)
SHOWN = {"config.yaml", *(block.name for block in all_blocks())}
SUFFIXES = ("json", "jsonl", "md", "png", "py", "sha256", "yaml")
LANGUAGES = {"sh", "output", "text", "python", "yaml", "json"}
COMMANDS = typer.main.get_command(app)
KNOWN = {".".join(parts[: n + 1]) for key in all_keys() for parts in [key.name.split(".")] for n in range(len(parts))}
FREE = {f"{key.name}.ANY" for key in all_keys() if key.type.startswith("{")}
"""What is within a mapping, such as the arguments of a function."""
NAMES = re.compile(
    "|".join(
        re.escape(name).replace("NAME", r"\w+").replace("NUMBER", r"(\d+|N)").replace("ANY", ".*")
        for name in KNOWN | FREE
    )
)
ALL_COMMANDS = [(block, command) for block in all_blocks("sh") for command in block.commands()]


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page: Path) -> None:
    targets = [target for target in LINK.findall(page.read_text()) if "://" not in target]
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_every_page_is_two_clicks_from_the_readme() -> None:
    def linked(page: str) -> set[str]:
        targets = {(ROOT / page).parent / target for target in LINK.findall(read_page(page)) if "://" not in target}
        return {path.resolve().relative_to(ROOT).as_posix() for path in targets if path.suffix == ".md"}

    first = linked("README.md")
    assert set(PAGES) <= first.union({"README.md"}, *map(linked, first))


def test_the_readme_names_every_config() -> None:
    named = set(spans(read_page("README.md")))
    configs = [path.name for path in (ROOT / "configs").iterdir()]
    assert [name for name in configs if not {name, f"configs/{name}"} & named] == []


def test_a_link_is_seen() -> None:
    assert LINK.findall("[a](b.md#c), ![d](e.png)") == ["b.md", "e.png"]


@pytest.mark.parametrize("page", [*PAGES, "benchmarks/README.md"])
def test_files_exist(page: str) -> None:
    texts = [*spans(read_page(page)), *(block.text for block in blocks(page))]
    named = {path for text in texts for path in PATH.findall(text)}
    configs = {f"configs/{text}" for text in texts if re.fullmatch(r"\w+\.yaml", text) and text not in SHOWN}
    assert [path for path in sorted((named | configs) - NO_FILES) if not (ROOT / path).exists()] == []


def test_every_block_says_what_it_is() -> None:
    assert [str(block) for block in all_blocks() if block.language not in LANGUAGES] == []
    assert [str(block) for block in all_blocks("text") if TEXT_COMMAND.search(block.text)] == []


def test_every_command_is_run_or_has_a_reason_why_not() -> None:
    unknown = [
        f"{block}: {command}"
        for block, command in ALL_COMMANDS
        if (run_of(block.page, command) is None) == (reason_not_to_run(block.page, command) is None)
    ]
    assert unknown == [], "add each to RUNS or to NOT_RUN of tests/helpers/page_commands.py"


def test_every_run_command_is_checked_by_its_output_or_its_files() -> None:
    unchecked = []
    for page, runs in RUNS.items():
        commands = [command for block in blocks(page, "sh") for command in block.commands()]
        shown = commands_with_output(page)
        for begin, run in runs.items():
            assert any(run_of(page, command) is run for command in commands), f"{page} has no {begin}"
            has_output = any(run_of(page, command) is run for command in shown)
            if not (run.prints or run.writes or run.serves or has_output):
                unchecked.append(f"{page}: {begin}")
    assert unchecked == []


def commands_with_output(page: str) -> list[str]:
    """Return the commands of a page after which it shows their output: those that `run_page` compares with it."""
    shown, last = [], ""
    for block in blocks(page, "sh", "output"):
        if block.language == "output":
            shown.append(last)
        for command in block.commands() if block.language == "sh" else []:
            last = last if reason_not_to_run(page, command) else command
    return shown


def test_what_is_not_run_is_in_the_pages() -> None:
    commands = {page: [text for block in blocks(page, "sh") for text in block.commands()] for page in NOT_RUN}
    begins = [(page, begin) for page, reasons in NOT_RUN.items() for begin in reasons]
    assert [(p, begin) for p, begin in begins if not any(text.startswith(begin) for text in commands[p])] == []


@pytest.mark.parametrize(
    ("documented", "is_printed"),
    [
        ("12 steps, accuracy 0.99 (version 1,360)\n...\nend", True),
        ("12 steps, accuracy 0.8 (version 1,360)", False),
        ("300 steps, accuracy 0.95 (version 1,360)", False),
        ("12.0 steps, accuracy 0.95 (version 1,360)", False),
        ("12 steps, accuracy 0.95 (version 360)", False),
        ("12 steps, accuracy 0.95", False),
        ("difference +0.070 (-0.020 to +0.1), length -2.5", True),
        ("difference -0.070 (+0.020 to +0.1), length -2.5", False),
        ("difference 0.020 (+0.020 to +0.1), length -2.5", False),
        ("difference +0.070 (-0.080 to +0.1), length -2.5", False),
        ("difference +0.070 (+0.020 to +0.1), length -9.5", False),
        ("step 4 in 12.5 s, 3 of 512 completions, 1.5 GiB, median <= 36", True),
        ("step 4 in 12.5 s, 3 of 511 completions, 1.5 GiB, median <= 36", False),
        ("step 5 in 12.5 s, 3 of 512 completions, 1.5 GiB, median <= 36", False),
    ],
)
def test_lines_that_were_not_printed(documented: str, is_printed: bool) -> None:
    printed = (
        "12 steps, accuracy  0.95 (version 1,360)\n"
        "difference +0.050 (+0.020 to +0.1), length -3.0\n"
        "step 4 in 99.5 s, 7 of 512 completions, 0.2 GiB, median <= 44\nend"
    )
    assert (unprinted_lines(documented, printed) == []) is is_printed


def test_whole_numbers_may_differ_after_smaller_settings() -> None:
    assert unprinted_lines("12 steps, accuracy 0.95", "3 steps, accuracy 0.9", counts=False) == []
    assert unprinted_lines("12 steps\n9 rows", "3 steps\nnine rows", counts=False) == ["9 rows"]


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_their_keys_exist(page: str) -> None:
    """Also of the commands within sentences and tables."""
    texts = [part for block in blocks(page, "sh") for text in block.commands() for part in re.split(r"; |-- ", text)]
    texts += [re.sub(r" ?\[[^\]]*\]|\.\.\.", "", span) for span in spans(read_page(page))]
    faults = []
    for text in sorted({text for text in texts if text.startswith("rlsys ")}):
        try:
            parse_command(*shlex.split(text)[1:])
        except (typer.Exit, Exception) as error:  # noqa: BLE001 - whatever is wrong with it, the list shows it
            faults.append(f"{text}: {error!r}")
    assert faults == []


def parse_command(name: str, *arguments: str) -> None:
    """Raise if the command line would not take this command, or the schema its keys."""
    overrides = [word for word in arguments if re.match(r"[a-z_]+(\.\w+)*=", word)]
    for override in overrides:
        apply_override(values := minimal(), override)
        assert_known(values)
    if name != "--version" and (command := COMMANDS.commands[name]) and len(arguments) > len(overrides):
        command.make_context(name, list(arguments))
    if name in ("train", "check", "search") and arguments and (ROOT / arguments[0]).is_file():
        load_config(ROOT / arguments[0], overrides)


def assert_known(values: object, prefix: str = "") -> None:
    """Raise if a nested config has a key that the schema does not have."""
    for key, value in values.items() if isinstance(values, dict) else []:
        name = f"{prefix}{key}"
        assert NAMES.fullmatch(name), f"unknown key {name}"
        assert_known(value, f"{name}.")


@pytest.mark.parametrize("page", PAGES)
def test_settings_within_sentences_exist(page: str) -> None:
    """A dotted name such as train.max_steps, an override, or YAML such as `search: {fraction: 0.5}`."""
    sections = "|".join(Config.model_fields)
    faults = []
    text = re.sub(r"## Fault points\n.*?\n## ", "", read_page(page), flags=re.DOTALL)  # they have such names, too
    for span in sorted(set(spans(text))):
        values: dict[str, object] = {}
        try:
            if re.match(rf"'?({sections})(\.\w+)*=", span):
                for word in shlex.split(span):
                    apply_override(values, word)
            elif re.match(rf"({sections}): ", span):
                values = yaml.safe_load(span)
            elif re.fullmatch(rf"({sections})(\.[a-z_]\w*|\.N)+", span) and Path(span).suffix[1:] not in SUFFIXES:
                apply_override(values, f"{span}=null")
            assert_known(values)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with it, the list shows it
            faults.append(f"{span}: {error!r}")
    assert faults == []


@pytest.mark.parametrize("block", all_blocks("yaml"), ids=str)
def test_settings_are_valid(block: Block) -> None:
    values = yaml.safe_load(block.text)
    if "type" in values:  # a file for `rlsys evaluate --task`
        values = {"task": values}
    parse_config(values if "run" in values else minimal(**values), str(block))


def test_every_count_is_explained() -> None:
    """docs/numbers.md has every key that decides how much is sampled and trained, and how old a sample may be."""
    sections = (
        "actors",
        "environment",
        "evaluation",
        "learner",
        "preference",
        "sampling",
        "sft",
        "train",
        "warm_start",
    )
    others = re.compile(r".*(optimizer\..*|max_restarts|max_skipped_steps|threads|block_size|search_answers)")
    counts = [key.name for key in all_keys() if key.name.startswith(sections) and key.type.startswith("whole number")]
    explained = set(spans(read_page("docs/numbers.md")))
    assert [name for name in counts if name not in explained and not others.fullmatch(name)] == []
