"""The content of the pages, as values for their templates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from rlsys.config.schema import Config
from rlsys.config.search import ExtractConfig
from rlsys.errors import ConfigError, DataError
from rlsys.run.judgements import judged_of
from rlsys.run.step_times import PARTS
from rlsys.search.marks import read_marks
from rlsys.search.outline import question_text
from rlsys.trees import ENVIRONMENT, Tree, TreeFailure
from rlsys.viewer import curves, rollout_rows, timeline, tree_view
from rlsys.viewer.run_files import RunFiles

Values = dict[str, Any]
PAGE = 50
"""Trees on a page."""
PAGES = (("/", "Curves"), ("/timeline", "Times"), ("/rollouts", "Rollouts"), ("/trees", "Trees"))
COMPARE = ("/compare", "Compare rollouts")
_BRIEF = 160  # characters of a question in the list of trees


class MissingTreeError(ConfigError):
    """No tree of a run has the number that was asked for."""


@cache
def environment() -> Environment:
    """Return the templates. They escape every value, because models and data sets wrote most of them."""
    templates = Environment(
        loader=PackageLoader("rlsys.viewer"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.globals["judged_of"] = judged_of
    templates.globals["colours"] = rollout_rows.COLOURS
    templates.globals["levels"] = {
        "advantage": rollout_rows.legend(rollout_rows.ADVANTAGES),
        "gap": rollout_rows.legend(rollout_rows.GAPS),
    }
    templates.globals["part_names"] = {part: name for part, (_, name) in PARTS.items()}
    return templates


def overview(runs: Sequence[RunFiles]) -> Values:
    """Return the values of the page with the curves."""
    rows = [run.rows() for run in runs]
    return {
        "groups": curves.curve_groups(rows),
        "damaged": sum(run.damaged for run in runs),
        "places": [_place(each) for each in rows],
        "grown": any(run.trees.has_files() for run in runs),
        "settings": runs[0].config_text(),
    }


def _place(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the place of the last row of a run."""
    if not rows:
        return "no step yet"
    last = rows[-1]
    return f"stage {last['stage']}, step {last['step']}, weight version {last.get(curves.VERSION, 0):g}"


def points(runs: Sequence[RunFiles]) -> Values:
    """Return the points of all curves, and whether more are to be expected."""
    rows = [run.rows() for run in runs]
    places = [_place(each) for each in rows]
    return {**curves.curve_points(rows), "places": places, "live": any(run.is_live for run in runs)}


def times(run: RunFiles) -> Values:
    """Return the values of the page with the time of the steps."""
    config = run.config()
    overlapping = config is not None and config.train.max_staleness > 0
    return {"lines": timeline.timelines(run.rows(), overlapping=overlapping)}


def rollouts(run: RunFiles, version: int | None, order: str, colour: str = "") -> Values:
    """Return the values of the page with the rollouts of a weight version, or of the nearest one."""
    shown, rows = run.rollouts(version)
    before, after = run.neighbours(shown) if rows else (None, None)
    order = order if order in ("best", "worst") else "kept"
    return {
        "version": shown,
        "asked": version,
        "before": before,
        "after": after,
        "order": order,
        "cut_off": [] if rows else run.cut_off_rollouts(),
        "groups": rollout_groups(rollout_rows.ordered(rows, order)),
        **colouring(rows, colour),
    }


def colouring(rows: Iterable[Mapping[str, Any]], colour: str = "") -> Values:
    """Return what the colours of tokens show at first: what was asked for, or else advantages where there are any."""
    known = rollout_rows.has_advantages(rows)
    default = "advantage" if known else "chance"
    return {"colour": colour if known and colour in rollout_rows.COLOURS else default, "colours_known": known}


def rollout_groups(rows: Sequence[Mapping[str, Any]]) -> list[list[Values]]:
    """Return the rows of each prompt, in the order of the first row of each."""
    groups: dict[str, list[Values]] = {}
    for row in rows:
        groups.setdefault(row["prompt_id"], []).append(rollout_rows.card(row))
    return list(groups.values())


def compare(runs: Sequence[RunFiles], version: int | None, colour: str = "") -> Values:
    """Return the values of the page with the rollouts of common prompts of two runs."""
    newest = [run.rollouts()[0] for run in runs]
    chosen = min(newest) if version is None else version
    kept = [run.versions_like(chosen) for run in runs]
    triples = rollout_rows.paired(kept[0], kept[1], chosen)
    cards = [
        (prompt, *([rollout_rows.card(row) for row in side] for side in (left, right)))
        for prompt, left, right in triples[:8]
    ]
    shown = [row for _, left, right in triples[:8] for row in (*left, *right)]
    return {"version": chosen, "pairs": cards, **colouring(shown, colour)}


def tree_list(run: RunFiles, page: int, query: str, only: str) -> Values:
    """Return the values of a page of the list of trees."""
    run.trees.refresh()
    places = run.trees.places
    kinds = {"right": lambda p: p.right, "wrong": lambda p: not p.right and not p.failed, "failed": lambda p: p.failed}
    wanted = kinds.get(only, lambda _place: True)
    numbers = [n for n, place in enumerate(places) if query in place.prompt_id and wanted(place)]
    count = max(1, -(-len(numbers) // PAGE))
    page = min(max(1, page), count)
    marks = [read_marks(search.marks) for search in run.trees.searches]
    rows = []
    for number in numbers[(page - 1) * PAGE : page * PAGE]:
        row: Values = {"number": number, "prompt_id": places[number].prompt_id, "question": ""}
        try:
            tree = run.trees.tree(number)
        except DataError as error:
            rows.append(row | {"failed": error.message})
            continue
        row["question"] = question_text(tree.question)[:_BRIEF]
        if isinstance(tree, TreeFailure):
            rows.append(row | {"failed": tree.reason})
        else:
            facts = tree_view.facts(tree, marks[places[number].search])
            rows.append(row | {"failed": "", "facts": facts})
    return {
        "rows": rows,
        "total": len(places),
        "cut_off": run.trees.cut_off,
        "solved": sum(place.right for place in places),
        "matches": len(numbers),
        "number": page,
        "count": count,
        "query": query,
        "only": only if only in kinds else "all",
    }


def _kinds(config: Config | None, grown: Tree) -> dict[str, int]:
    """Return the colour of each node type but replies, the same in all trees of a run."""
    own = {node.type for node in grown.nodes[1:]} - {ENVIRONMENT}
    types = dict.fromkeys([*(config.search.nodes if config else ()), *sorted(own)])
    return {name: place % 6 for place, name in enumerate(types)}


def tree(run: RunFiles, number: int, run_number: int, node: int = 0) -> Values:
    """Return the values of the page of a tree.

    Args:
        node: a node to which the way is open.
    Raises:
        MissingTreeError: there is no tree with this number.
        DataError: the tree cannot be read.
    """
    run.trees.refresh()
    if number >= len(run.trees.places):
        raise MissingTreeError(f"there is no tree number {number}; the run has {len(run.trees.places)} trees")
    grown = run.trees.tree(number)
    view: Values = {"number": number, "run": run_number, "prompt_id": grown.prompt_id, "failed": ""}
    if isinstance(grown, TreeFailure):
        return {"view": view | {"failed": grown.reason}, "total": len(run.trees.places)}
    marks = read_marks(run.trees.search_of(number).marks)
    config = run.config()
    extract = config.extract if config else ExtractConfig()
    model = Path(config.model.path) if config and config.model.path else run.directory.model
    kinds = _kinds(config, grown)
    view |= {
        "tree": grown,
        "question": question_text(grown.question),
        "facts": tree_view.facts(grown, marks),
        "events": list(tree_view.events(grown, marks, node)),
        "kinds": kinds,
        "pairs": tree_view.pairs(grown, marks, extract, tree_view.end_tokens(model)),
    }
    return {"view": view, "total": len(run.trees.places)}
