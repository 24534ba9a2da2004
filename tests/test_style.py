"""Check the rules of CONTRIBUTING.md that a program can check: sizes, first lines of docstrings, telling names."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [file for package in ("rlsys", "actors", "learners") for file in sorted((ROOT / package).rglob("*.py"))]
OTHERS = [file for folder in ("tests", "benchmarks") for file in sorted((ROOT / folder).rglob("*.py"))]
Function = ast.FunctionDef | ast.AsyncFunctionDef

FILE_LINES, FUNCTION_LINES, CLASS_LINES, FIRST_LINE_WORDS = 400, 40, 250, 20
# A first line with one of these words describes a thing by a question in place of its name.
QUESTIONS = {"what", "whether", "where", "which", "why", "how", "who", "whose", "whoever", "nobody"}
# Names that say nothing about their content.
EMPTY_NAMES = {"found", "what", "asked", "beside"}


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def definitions(tree: ast.Module) -> Iterator[Function | ast.ClassDef]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return (node for node in ast.walk(tree) if isinstance(node, kinds))


def lines_of(node: Function | ast.ClassDef) -> int:
    """Return the number of lines of a definition, for a function without its docstring."""
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    if isinstance(node, ast.ClassDef) or ast.get_docstring(node) is None:
        return lines
    docstring = node.body[0]
    return lines - ((docstring.end_lineno or docstring.lineno) - docstring.lineno + 1)


def size_faults(tree: ast.Module, lines: int) -> list[str]:
    faults = [f"{lines} lines, more than {FILE_LINES}"] if lines > FILE_LINES else []
    for node in definitions(tree):
        limit = CLASS_LINES if isinstance(node, ast.ClassDef) else FUNCTION_LINES
        if lines_of(node) > limit:
            faults.append(f"{node.name}: {lines_of(node)} lines, more than {limit}")
    return faults


def is_bool_property(node: ast.AST) -> bool:
    """Return whether a node defines a property of type bool, whose docstring may begin with "Whether"."""
    if not isinstance(node, ast.FunctionDef) or not isinstance(node.returns, ast.Name) or node.returns.id != "bool":
        return False
    return any(isinstance(decorator, ast.Name) and decorator.id == "property" for decorator in node.decorator_list)


def word_faults(tree: ast.Module) -> list[str]:
    faults = []
    for node in (tree, *definitions(tree)):
        first_line = (ast.get_docstring(node) or "").split("\n\n")[0]
        words = first_line.replace("\n", " ").split()
        name = getattr(node, "name", "module")
        if isinstance(node, Function) and len(words) > FIRST_LINE_WORDS and "\n" not in first_line:
            faults.append(f"{name}: {len(words)} words in the first line of its docstring")
        first_word = words[0].lower().rstrip(".,:") if words else ""
        if first_word in QUESTIONS and not (first_word == "whether" and is_bool_property(node)):
            faults.append(f"{name}: its docstring begins with {words[0]!r}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in EMPTY_NAMES:
            faults.append(f"line {node.lineno}: the name {node.id!r} says nothing about its content")
        if isinstance(node, ast.arg) and node.arg in EMPTY_NAMES:
            faults.append(f"line {node.lineno}: the name {node.arg!r} says nothing about its content")
    return faults


@pytest.mark.parametrize("file", SOURCES, ids=name_of)
def test_sizes(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert size_faults(ast.parse(text), text.count("\n")) == []


@pytest.mark.parametrize("file", SOURCES, ids=name_of)
def test_words(file: Path) -> None:
    assert word_faults(ast.parse(file.read_text(encoding="utf-8"))) == []


def test_the_rules_find_what_they_forbid() -> None:
    long_function = "def long():\n" + "    x = 1\n" * FUNCTION_LINES
    assert size_faults(ast.parse(long_function), 3) == [f"long: {FUNCTION_LINES + 1} lines, more than {FUNCTION_LINES}"]
    documented = 'def short():\n    """Do.\n' + "\n    More.\n" * FUNCTION_LINES + '    """\n    return 1\n'
    assert size_faults(ast.parse(documented), FILE_LINES + 1) == [f"{FILE_LINES + 1} lines, more than {FILE_LINES}"]
    bad = 'def f(what):\n    """Whether it is so."""\n    found = 1\n'
    assert word_faults(ast.parse(bad)) == [
        "f: its docstring begins with 'Whether'",
        "line 1: the name 'what' says nothing about its content",
        "line 3: the name 'found' says nothing about its content",
    ]
    flag = '@property\ndef f(self) -> {}:\n    """{} it is so."""\n'
    assert word_faults(ast.parse(flag.format("bool", "Whether"))) == []
    assert word_faults(ast.parse(flag.format("str", "Whether"))) == ["f: its docstring begins with 'Whether'"]
    assert word_faults(ast.parse(flag.format("bool", "What"))) == ["f: its docstring begins with 'What'"]
    wordy = f'def g():\n    """{"Do it " * FIRST_LINE_WORDS}"""\n'
    assert word_faults(ast.parse(wordy)) == [f"g: {2 * FIRST_LINE_WORDS} words in the first line of its docstring"]


def test_files_of_tests_and_benchmarks_are_short() -> None:
    lines = {name_of(file): len(file.read_text(encoding="utf-8").splitlines()) for file in OTHERS}
    assert {name: count for name, count in lines.items() if count > FILE_LINES} == {}
