"""The pages over HTTP: every one of them, with texts that attack it, without data, and with damaged data."""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import group, prompt, trajectory
from starlette.testclient import TestClient
from tree_samples import answer, golden, node, tree
from viewed_run import ATTACK, step_record, write_metrics, write_rollouts, write_run, write_trees

from rlsys.errors import ConfigError
from rlsys.interfaces import TokenValues
from rlsys.run.lock import RunLock
from rlsys.run.rollout_files import RolloutLog, read_rollouts, record
from rlsys.search.marks import read_marks
from rlsys.search.tree_json import read_trees, tree_line
from rlsys.trees import ENVIRONMENT, Tree
from rlsys.viewer import rollout_rows
from rlsys.viewer.app import build
from rlsys.viewer.export import page
from rlsys.viewer.run_files import RunFiles

ROOT = Path(__file__).parents[3]
PAGES = ("/", "/timeline", "/rollouts", "/trees", "/tree/0", "/tree/3")


class Tags(HTMLParser):
    """Collects tags with attributes, and the text between them."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def parse(text: str) -> Tags:
    parser = Tags()
    parser.feed(text)
    return parser


def client(*folders: Path, **options: Any) -> TestClient:
    return TestClient(build([RunFiles(folder) for folder in folders], **options), base_url="http://127.0.0.1")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


@pytest.mark.parametrize("path", PAGES)
def test_texts_of_models_are_text(path: str, run_dir: Path) -> None:
    response = client(run_dir).get(path)
    assert response.status_code == 200
    tags = parse(response.text)
    assert "img" not in dict(tags.tags) and not any(name.startswith("on") for _, found in tags.tags for name in found)
    scripts = [attributes for tag, attributes in tags.tags if tag == "script"]
    assert all(str(attributes.get("src", "")).startswith("/static/") for attributes in scripts)
    assert len(scripts) == (2 if path == "/" else 0)
    if path != "/timeline":
        joined = "".join(tags.text.split())
        assert "".join(ATTACK.split()) in joined, "the text itself is there"


@pytest.mark.parametrize("path", [*PAGES, "/static/curves.js", "/nothing"])
def test_pages_forbid_what_they_do_not_need(path: str, run_dir: Path) -> None:
    policy = client(run_dir).get(path).headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'") and "unsafe" not in policy


def test_nothing_is_loaded_from_elsewhere(run_dir: Path) -> None:
    static = Path(__file__).parents[3] / "rlsys" / "viewer"
    for path in (*(static / "templates").iterdir(), static / "static" / "style.css", static / "static" / "curves.js"):
        assert not re.search(r"(?:src|href|url|fetch|import)\W{1,3}(?:https?:)?//", path.read_text()), path.name


def test_another_name_of_this_machine_is_refused(run_dir: Path) -> None:
    served = client(run_dir)
    assert served.get("/", headers={"host": "evil.example:6007"}).status_code == 421
    assert [served.get("/", headers={"host": host}).status_code for host in ("localhost:6007", "[::1]:6007")] == [
        200,
        200,
    ]
    assert client(run_dir, hosts=()).get("/", headers={"host": "cluster:6007"}).status_code == 200


def test_a_run_without_data_says_what_will_come(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run: {dir: x}\n")
    served = client(tmp_path)
    for path, words in (
        ("/", "No training step is finished yet"),
        ("/timeline", "No training step is finished yet"),
        ("/rollouts", "No rollouts are kept here"),
        ("/trees", "No trees here"),
    ):
        assert words in served.get(path).text
    nothing = {"x": [], "runs": [{}], "width": 1, "places": ["no step yet"], "live": False}
    assert served.get("/data.json").json() == nothing
    missing = served.get("/tree/0")
    assert missing.status_code == 404 and "there is no tree number 0" in missing.text


def test_a_search_leads_to_its_trees(tmp_path: Path) -> None:
    write_trees(tmp_path)
    assert '<a href="/trees">The trees of the search</a>' in client(tmp_path).get("/").text
    copied = page([RunFiles(tmp_path)])
    assert '<h2 id="trees">' in copied and 'href="/' not in copied, "a copy has no other page"


def test_rows_appear_while_the_run_writes_them(tmp_path: Path) -> None:
    write_metrics(tmp_path, steps=2)
    run = RunFiles(tmp_path)
    assert [row["step"] for row in run.rows()] == [1, 2], "the last line is cut"
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + 'ine", "step": 3, "weights/version": 3, "rollout/reward": null}\nrubbish\n')
    assert [row["step"] for row in run.rows()] == [1, 2, 3] and run.damaged == 1
    assert "rollout/reward" not in run.rows()[2]
    other = tmp_path / "other"
    write_metrics(other, steps=1)
    (other / "metrics.jsonl").replace(path)  # a resumed run replaces the file by a shorter one
    assert [row["step"] for row in run.rows()] == [1] and run.damaged == 0


def test_the_nearest_kept_step_is_shown(tmp_path: Path) -> None:
    write_rollouts(tmp_path, range(99, 102), "text")
    write_metrics(tmp_path)
    run = RunFiles(tmp_path)
    assert run.rollouts()[0] == 101 and run.rollouts(100)[0] == 100
    assert run.rollouts(50)[0] == 99 and run.rollouts(1000)[0] == 101
    assert [run.neighbours(version) for version in (99, 100, 101)] == [(None, 100), (99, 101), (100, None)]
    text = client(tmp_path).get("/rollouts?version=7").text
    assert "Weight version 7 keeps no rollouts; this is the nearest one." in text
    best = client(tmp_path).get("/rollouts?order=best").text
    worst = client(tmp_path).get("/rollouts?order=worst").text
    one, zero = "<b>reward 1</b>", "<b>reward 0</b>"
    assert best.index(one) < best.index(zero) and worst.index(zero) < worst.index(one)


def spans(text: str, words: str) -> list[tuple[str, str]]:
    """Return the classes and titles of the tokens whose title has some words."""
    tags = [attributes for tag, attributes in parse(text).tags if tag == "span" and "title" in attributes]
    found = [(str(each["class"]), str(each["title"])) for each in tags]
    return [(classes, title) for classes, title in found if words in title]


def colour_of(text: str) -> list[str | None]:
    """Return the choices of the colour that are checked."""
    radios = [attributes for tag, attributes in parse(text).tags if attributes.get("type") == "radio"]
    assert [each["value"] for each in radios] == ["advantage", "gap", "chance"]
    return [each["value"] for each in radios if "checked" in each]


def test_tokens_are_coloured_by_advantage_gap_or_chance(run_dir: Path) -> None:
    served = client(run_dir)
    text = served.get("/rollouts").text
    assert colour_of(text) == ["advantage"]
    assert colour_of(served.get("/rollouts?colour=gap").text) == ["gap"]
    assert colour_of(served.get("/rollouts?colour=nothing").text) == ["advantage"]
    assert colour_of(page([RunFiles(run_dir)])) == ["advantage"]
    # The second completion of a prompt has the last two of five tokens: probability 1, advantages 1 and 2, gaps 1/4
    # and 1/2.
    hints = {hint.split(", ", 1)[1]: classes for classes, hint in spans(text, "log-probability 0.000")}
    assert hints == {
        "log-probability 0.000, advantage +1, gap +0.25": "tok ap2 gp2 s0",
        "log-probability 0.000, advantage +2, gap +0.5": "tok ap3 gp3 s0",
    }
    assert "<span>advantages +1 to +2, mean +1.5</span>" in text and "<span>largest gap +0.5</span>" in text


def test_levels_are_symmetric() -> None:
    values = [None, 0.0, 0.01, -0.01, 0.02, -0.02, 0.6, -1.5, 7.0, -7.0]
    assert [rollout_rows.level(value, rollout_rows.ADVANTAGES) for value in values] == [
        "x", "0", "0", "0", "p1", "n1", "p2", "n3", "p4", "n4",
    ]  # fmt: skip
    names = [name for name, _ in rollout_rows.legend(rollout_rows.ADVANTAGES)]
    assert names == ["n4", "n3", "n2", "n1", "0", "p1", "p2", "p3", "p4"]


def test_a_completion_without_advantages_says_why(tmp_path: Path) -> None:
    log, groups = RolloutLog(tmp_path, -1, 2, str), [group(prompt("p"))]
    rows = log.rows(groups, "online", 1, 1)
    log.write(1, record(rows, [TokenValues(untrained="not trained: all rewards of the group are equal")] * len(rows)))
    log.close()
    text = client(tmp_path).get("/rollouts?colour=gap").text
    assert colour_of(text) == ["chance"] and "no completion here has advantages" in text
    assert text.count('<span class="warn">not trained: all rewards of the group are equal</span>') == len(rows)
    assert {classes for classes, _ in spans(text, "log-probability")} == {"tok ax gx s0"}


def test_tokens_of_others_are_neutral(tmp_path: Path) -> None:
    answered = replace(trajectory(length=3), loss_mask=np.array([0, 0, 0, 1, 0, 1], bool))
    log, groups = (
        RolloutLog(tmp_path, -1, 2, lambda ids: "x" * len(ids)),
        [replace(group(prompt("p")), trajectories=(answered,))],
    )
    log.write(1, step_record(log, groups, 1, 1))
    nan = np.nan
    elsewhere = TokenValues(advantages=np.array([nan] * 5 + [1]), gaps=np.array([nan] * 5 + [0.5]))
    log.write(2, record(log.rows(groups, "online", 2, 2), [elsewhere]))
    log.close()
    served = client(tmp_path)
    assert [each for each, _ in spans(served.get("/rollouts?version=1").text, "not trained")] == ["tok forced"]
    other = spans(served.get("/rollouts?version=2").text, "trained with another completion")
    assert [classes for classes, _ in other] == ["tok ax gx s0"]


def test_rollouts_from_before_advantages_are_shown(tmp_path: Path) -> None:
    write_rollouts(tmp_path, range(1, 2), "text")
    path = tmp_path / "rollouts" / "000000.jsonl.gz"
    rows = read_rollouts(tmp_path, 0)[1]
    old = [{**row, "format": 1} for row in rows]
    for row in old:
        del row["advantages"], row["gaps"], row["untrained"]
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in old).encode()))
    text = client(tmp_path).get("/rollouts").text
    assert colour_of(text) == ["chance"] and "not trained:" not in text and "log-probability -0.500" in text


def test_the_buttons_beside_the_version_go_to_its_neighbours(tmp_path: Path) -> None:
    write_rollouts(tmp_path, range(1, 4), "text")
    served = client(tmp_path)
    tags = parse(served.get("/rollouts?version=2").text).tags
    assert [each.get("value") for tag, each in tags if tag == "button"] == [None, "1", "3"]
    assert 'name="version" value="3"' in served.get("/rollouts?version=2&go=3&colour=gap").text


def test_damaged_files_are_named_on_their_page_alone(run_dir: Path) -> None:
    (run_dir / "rollouts" / "000000.jsonl.gz").write_bytes(b"rubbish")
    shard = run_dir / "trees" / "00000.jsonl"
    shard.write_text(shard.read_text().replace('"format":1', '"format":9', 1))
    served = client(run_dir)
    for path, words in (("/rollouts", "000000.jsonl.gz: expected rollouts"), ("/tree/0", "format 1, found 9")):
        response = served.get(path)
        assert response.status_code == 422 and words in response.text
    assert [served.get(path).status_code for path in ("/", "/timeline", "/tree/1")] == [200, 200, 200]
    listed = served.get("/trees")
    assert listed.status_code == 200 and "format 1, found 9" in listed.text and '"/tree/1?run=0"' in listed.text


@pytest.mark.parametrize("kept", [500, -9])
def test_a_shard_that_is_cut_off_is_named(run_dir: Path, kept: int) -> None:
    shard = run_dir / "trees" / "00000.jsonl"
    shard.write_text(shard.read_text()[:kept])
    words = f"{shard}: expected a line end, found the file cut off"
    assert words in client(run_dir).get("/trees").text
    assert words in page([RunFiles(run_dir)])


def test_a_file_of_rollouts_that_is_cut_off_is_named_unless_the_run_writes_it(run_dir: Path) -> None:
    path = run_dir / "rollouts" / "000000.jsonl.gz"
    path.write_bytes(path.read_bytes()[:100])
    words = f"{path}: expected rollouts, found the file cut off inside its first step; restore it"
    assert words in client(run_dir).get("/rollouts").text
    assert words in page([RunFiles(run_dir)])
    with RunLock(run_dir):
        assert "No rollouts are kept here" in client(run_dir).get("/rollouts").text
        assert "No rollouts are kept." in page([RunFiles(run_dir)])


def test_trees_are_listed_by_page_prompt_and_result(tmp_path: Path) -> None:
    write_trees(tmp_path, count=60)
    served = client(tmp_path)
    first, second = served.get("/trees").text, served.get("/trees?page=2").text
    assert first.count('href="/tree/') == 50 and second.count('href="/tree/') == 11 and "61 of 61 trees" in first
    assert "1 of 61 trees" in served.get("/trees?only=failed").text
    assert "60 of 61 trees" in served.get("/trees?only=right").text
    assert "0 of 61 trees" in served.get("/trees?only=wrong").text
    assert "1 of 61 trees" in served.get("/trees?q=failed").text
    assert served.get("/trees?page=99&run=7&q=%3Cscript%3E").status_code == 200


def test_node_types_have_one_colour_in_all_trees_and_replies_of_an_environment_none(tmp_path: Path) -> None:
    called = tree(
        node(0, "<tool>1+1</tool>", "tool"),
        node(1, "<result>2</result>", ENVIRONMENT),
        answer(2, "<answer>2</answer>", "ok"),
    )
    thought = tree(node(0, "<thinking>1+1=2</thinking>"), answer(1, "<answer>2</answer>", "ok"))
    (tmp_path / "trees").mkdir()
    (tmp_path / "trees" / "00000.jsonl").write_text("".join(tree_line(each) + "\n" for each in (called, thought)))
    (tmp_path / "config.yaml").write_text((ROOT / "configs" / "search_sums_calculator.yaml").read_text())
    pages = [client(tmp_path).get(f"/tree/{number}").text for number in range(2)]
    kinds = [re.findall(r'<span class="kind (\w+)">(\w+)', page) for page in pages]
    assert kinds[0] == [("k1", "tool"), ("reply", ENVIRONMENT), ("k2", "answer")]
    assert kinds[1] == [("k0", "thinking"), ("k2", "answer")]
    assert '<div class="text reply">&lt;result&gt;2' in pages[0]
    assert [page.count("text reply") for page in pages] == [1, 0]


def test_times_have_an_axis_and_say_what_is_missing(run_dir: Path) -> None:
    def axis_and_notes() -> tuple[list[str], bool]:
        shown = client(run_dir).get("/timeline").text
        axis = shown.partition('<div class="axis">')[2].partition("</div>")[0]
        return re.findall("<span>(.*?)</span>", axis), "no actor could be asked" in shown

    assert axis_and_notes() == (["4 s", "0", "4 s"], False)
    path = run_dir / "metrics.jsonl"
    path.write_text(path.read_text().replace('"rollout/idle_policy": 0.25, ', "", 1))
    assert axis_and_notes() == (["4 s", "0", "4 s"], True), "the first step has no actors"


def marks_of(run_dir: Path, served: TestClient) -> tuple[dict[str, str], int]:
    """Return the fields of the first form of the first tree, and the node of its chain."""
    tags = parse(served.get("/tree/0").text).tags
    fields: dict[str, str] = {}
    for tag, attributes in tags:
        if tag == "input" and attributes["name"] not in fields:
            fields[str(attributes["name"])] = str(attributes["value"])
    return fields, int(fields["node"])


def test_a_chain_is_marked_and_unmarked(run_dir: Path) -> None:
    served = client(run_dir)
    form, node = marks_of(run_dir, served)
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    response = served.post("/mark", data=form | {"bad": "1"}, follow_redirects=False)
    assert (response.status_code, response.headers["location"]) == (303, f"/tree/0?run=0&node={node}#n{node}")
    assert read_marks(run_dir / "marks.json") == {f"{ATTACK}0": {form["digest"]}}
    assert "Take the mark away" in served.get("/tree/0").text and "1 marked" in served.get("/trees").text
    after = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file() and path.name != "marks.json"}
    assert after == before, "nothing else is written"
    served.post("/mark", data=form | {"bad": "0"})
    assert read_marks(run_dir / "marks.json") == {}


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"token": "guessed"}, 403),
        ({"token": ""}, 403),
        ({"tree": "99"}, 400),
        ({"run": "x"}, 400),
        ({"node": "1"}, 409),
        ({"digest": "0"}, 409),
        ({"tree": "3"}, 409),
        ({"more": "x" * 5000}, 413),
    ],
)
def test_a_form_that_is_not_from_the_page_changes_nothing(changes: dict[str, str], status: int, run_dir: Path) -> None:
    served = client(run_dir)
    form, _ = marks_of(run_dir, served)
    assert served.post("/mark", data=form | {"bad": "1"} | changes).status_code == status
    assert not (run_dir / "marks.json").exists()


def test_two_runs_are_shown_together(tmp_path: Path) -> None:
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other")
    served = client(one, other)
    assert len(served.get("/data.json").json()["runs"]) == 2
    text = served.get("/compare?version=2").text
    assert text.count("step 2, reference") == 4, "two prompts, in both runs"
    assert served.get("/rollouts?run=1").status_code == 200 and client(one).get("/compare").status_code == 404
    write_rollouts(tmp_path / "strange", text="other prompts")
    assert "keep no rollouts of a common prompt" in client(one, tmp_path / "strange").get("/compare").text


def test_the_copy_holds_everything_in_one_file(run_dir: Path) -> None:
    tags = parse(page([RunFiles(run_dir)]))
    loaded = [(tag, attributes) for tag, attributes in tags.tags if attributes.get("src") or tag in ("link", "img")]
    assert loaded == []
    assert [attributes for tag, attributes in tags.tags if tag == "form"] == [], "a copy marks nothing"
    meta = [attributes["content"] for tag, attributes in tags.tags if tag == "meta" and "http-equiv" in attributes]
    assert meta == ["default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"]
    assert "".join(ATTACK.split()) in "".join(tags.text.split())
    assert not any(name.startswith("on") for _, found in tags.tags for name in found)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a run directory of `rlsys train` or `rlsys search`"):
        RunFiles(tmp_path)


def test_the_helper_writes_what_it_says(run_dir: Path) -> None:
    trees = list(read_trees(run_dir / "trees" / "00000.jsonl"))
    assert isinstance(trees[0], Tree) and trees[0].nodes[1].text == golden().nodes[1].text + ATTACK
    assert read_rollouts(run_dir, 0)[1][0]["completion"] == ATTACK
