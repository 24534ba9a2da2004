"""The benchmarks refuse what would make their figures wrong."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = Path(__file__).parent.parent / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where a dataclass looks its names up
    monkeypatch.setattr(sys, "path", ["", *sys.path])  # a benchmark replaces the first entry
    spec.loader.exec_module(module)
    # In the benchmark alone: matplotlib, too, runs a program where it has not listed the fonts before.
    refusing = SimpleNamespace(run=lambda *arguments, **options: pytest.fail("a run was started"))
    monkeypatch.setattr(module, "subprocess", refusing, raising=False)
    return module


@pytest.fixture
def quickstart(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("quickstart", monkeypatch)


def test_a_run_that_was_cut_short_is_not_timed_from_its_resume(quickstart: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"stage": "online"}\n')
    with pytest.raises(SystemExit, match="cut short"):
        quickstart.run(0, tmp_path)
    (tmp_path / "wall-seconds").write_text("12.0\n")
    assert quickstart.run(0, tmp_path) == [{"stage": "online"}]


def test_the_folder_of_the_picture_is_made(
    quickstart: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quickstart, "PICTURE", tmp_path / "docs" / "picture.png")
    row = {"stage": "online", "step": 1, "rollout/reward": 0.5, "held_out/sampled_accuracy": 0.5}
    quickstart.plot({0: [row]})
    assert quickstart.PICTURE.stat().st_size > 0


@pytest.fixture
def reproduce(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("reproduce", monkeypatch)


def test_every_cell_of_the_ablation_has_a_policy_and_an_evaluation_of_its_own(
    reproduce: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: dict[Path, list[str]] = {}
    outputs: dict[Path, Path] = {}

    def measured(policy: Path, config: Path, seed: int, problems: int, output: Path) -> dict[str, str]:
        assert outputs.setdefault(output, policy) == policy  # a cell of the sweep may be one of the ablation
        return {"policy": str(policy)}

    def trained(run_dir: Path, config: Path, overrides: list[str]) -> None:
        assert runs.setdefault(run_dir, overrides) == overrides

    monkeypatch.setattr(reproduce, "measured", measured)
    monkeypatch.setattr(reproduce, "trained", trained)
    monkeypatch.setattr(reproduce, "pairs_of", lambda base, chosen: base / chosen)
    monkeypatch.setattr(reproduce, "chosen_logprob", lambda policy, pairs: 0.0)
    found = reproduce.of_seed("letter_count", 1, tmp_path)
    # Warm start, SFT, five rows, and of the five alphas two that are rows already.
    assert len(found) == 12 and len(set(outputs.values())) == len(outputs) == 10 and len(runs) == 9
    assert found["alpha 0"] == found["+cDPO"] and found["alpha 1"] == found["+joint, alpha 1"] != found["+masking"]


def test_effects_are_judged_by_the_figures(reproduce: ModuleType) -> None:
    # No answer of 100 problems: 2 after SFT, 8 after DPO; 6 after cDPO, 3 with the joint loss, which is half.
    def cell(missing: int) -> list[dict[str, dict[str, list[float]]]]:
        figures = {"no_answer_rate": [1.0] * missing + [0.0] * (100 - missing)}
        return [{"greedy": figures, "sampled": figures}]

    names = {"SFT": 2, "+DPO": 8, "+cDPO": 6, "+joint, alpha 1": 3}
    rise, halved = reproduce.effects_of({name: cell(missing) for name, missing in names.items()})[:2]
    assert rise.endswith("interval above 0. Met: yes.")
    assert halved.endswith("Met: yes, but the interval includes 0.")  # exactly half
    rise, halved = reproduce.effects_of({name: cell(missing) for name, missing in {**names, "+DPO": 5}.items()})[:2]
    assert rise.endswith("interval above 0. Met: no.")
    rise, halved = reproduce.effects_of(
        {name: cell(missing) for name, missing in {**names, "+joint, alpha 1": 4}.items()}
    )[:2]
    assert halved.endswith("Met: no.")
    halved = reproduce.effects_of({name: cell(n) for name, n in {**names, "+cDPO": 40}.items()})[1]
    assert halved.endswith("Met: yes.")
    halved = reproduce.effects_of({name: cell(n) for name, n in {**names, "+cDPO": 0}.items()})[1]
    assert halved.endswith("Met: there were no missing answers.")


def test_an_evaluation_of_other_weights_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = load("cells", monkeypatch)
    policy, config, output = tmp_path / "policy", tmp_path / "c.yaml", tmp_path / "evaluation.json"
    policy.mkdir()
    config.write_text("")
    calls = []

    def run(command: list[str], **options: object) -> None:
        calls.append(command)
        target = next(part for part in command if str(part).startswith("--output=")).removeprefix("--output=")
        Path(target).write_text(f'{{"call": {len(calls)}}}')
        Path(f"{target}.parts").mkdir()

    monkeypatch.setattr(cells, "subprocess", SimpleNamespace(run=run, DEVNULL=None))
    for weights, expected in (("a", 1), ("a", 1), ("b", 2)):
        (policy / "model.safetensors").write_text(weights)
        assert cells.evaluated(policy, config, ["run.seed=1"], output) == {"call": expected}
    assert cells.evaluated(policy, config, ["run.seed=2"], output) == {"call": 3}


@pytest.fixture
def joint_online(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("joint_online", monkeypatch)


def test_joint_training_is_compared_by_all_of_its_tokens(joint_online: ModuleType) -> None:
    first = {"held_out/sampled_accuracy": 0.2, "time/evaluate_s": 20.0}
    rows = [
        first,
        {"rollout/generated_tokens": 100, "time/step_s": 5.0, "rollout/reward": 0.1},
        {
            "rollout/generated_tokens": 100,
            "time/step_s": 25.0,
            "time/evaluate_s": 20.0,
            "rollout/reward": 0.3,
            "held_out/sampled_accuracy": 0.8,
        },
    ]
    found = joint_online.curve_of(rows)
    assert (found.tokens.tolist(), found.seconds.tolist()) == ([0, 200], [0, 10])
    assert found.reward.tolist() == [0.1, 0.2]  # of the first step, and of both
    # The smoothed accuracy rises from 0.2 to their mean, 0.5, over 200 tokens: 0.35 is half-way.
    assert found.tokens_to(0.35) == pytest.approx(100)
    assert np.isnan(found.tokens_to(0.6))
    assert found.area(200) == pytest.approx(0.5)


def test_what_joint_training_is_judged_by(joint_online: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint_online, "SMOOTHED", 1)

    def curve(*accuracy: float, tokens: float = 100.0) -> object:
        points = np.arange(len(accuracy)) * tokens
        return joint_online.Curve(points, np.array(accuracy), np.array(accuracy) / 2, points / 10)

    grpo = curve(0.4, 0.8, 0.92, 0.92)  # 300 tokens; at its last accuracy after 200
    joint = curve(0.4, 0.96, 0.96, tokens=50)  # 0.92 after 50 * 0.52 / 0.56 = 46.4 tokens
    never = curve(0.4, 0.9, 0.9, tokens=120)
    assert joint_online.share(grpo, grpo) == pytest.approx(2 / 3)
    assert joint_online.share(joint, grpo) == pytest.approx(50 * 0.52 / 0.56 / 300)
    assert joint_online.share(never, grpo) == pytest.approx(240 / 300)  # all its tokens: the least that it may need
    curves = {"GRPO": [grpo, grpo], "joint": [joint, never]}
    shares = {arm: [joint_online.share(each, grpo) for each in found] for arm, found in curves.items()}
    study = joint_online.STUDIES["letter_count"]
    judged, _, own, _, early = joint_online.verdict(study, shares, curves)
    assert "`joint` needs 0.477 of the tokens of `GRPO`" in judged and "The limit is 0.6. Met: no." in judged
    assert "1 of 2 seeds never reach it" in judged and "after 0.667" in own
    met = joint_online.verdict(study, {"GRPO": [1.0], "joint": [0.155]}, {"GRPO": [grpo], "joint": [joint]})[0]
    assert "needs 0.155 of the tokens" in met and "Met: yes." in met and "never" not in met
    # 0.9 after 183.3 tokens with GRPO; after 50 * 0.5 / 0.56 = 44.6 and after 120 jointly.
    assert "`GRPO` 183, `joint` 82. By seed, divided by those of the baseline: `joint` 0.244, 0.655" in early
    # As many tokens as both arms generated: 100 of the first pair, 240 of the second.
    table = joint_online.lines(study, [1, 2], {"GRPO": 1e-4, "joint": 2e-4}, curves)[4:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert cells[0] == ["1", "GRPO", "0.0001", "0.400", "100", "0.800", "0.400", "10", "300", "0.920", "0.667"]
    assert cells[1] == ["1", "joint", "0.0002", "0.400", "100", "0.960", "0.480", "10", "100", "0.960", "0.155"]
    assert (cells[2][4], cells[3][4], cells[3][-1]) == ("240", "240", "never")


def test_the_sweep_takes_the_rate_with_the_largest_area(joint_online: ModuleType) -> None:
    def curve(accuracy: float, end: float) -> object:
        tokens = np.array([0.0, end])
        return joint_online.Curve(tokens, np.array([0.4, accuracy]), np.zeros(2), np.zeros(2))

    # Over the 100 tokens that all have: means 0.5, (0.4 + 0.65) / 2 and 0.55.
    found = {1e-4: curve(0.6, 100), 2e-4: curve(0.9, 200), 4e-4: curve(0.7, 100)}
    assert joint_online.best_rate(found) == 4e-4
    row = joint_online.sweep_lines(joint_online.STUDIES["letter_count"], {"joint": found}, {"joint": 4e-4})[-1]
    assert row.startswith("| joint | 0.500 (") and row.endswith("| 0.0004, at the edge of the sweep |")


def test_ppo_is_judged_by_its_tokens_to_the_goal_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ppo = load("ppo", monkeypatch)
    found = {
        # accuracy before, and after every second step of 100 tokens
        "ppo_letter_count": [0.4, 0.5, 0.8],  # 0.70 after 200 + 2/3 * 200 tokens
        "quickstart": [0.4, 0.8, 0.9],  # 0.70 after 150 tokens
    }

    def metrics(run_dir: Path, stage: str) -> list[dict[str, float]]:
        name = run_dir.name.removesuffix("-0")
        rows = [{"held_out/sampled_accuracy": found[name][0]}]
        for accuracy in found[name][1:]:
            rows.append({"rollout/generated_tokens": 100, "value/explained_variance": 0.5})
            rows.append({"rollout/generated_tokens": 100, "held_out/sampled_accuracy": accuracy})
        rows[-1]["held_out/sampled_no_answer_rate"] = 0.1
        return rows

    monkeypatch.setattr(ppo, "trained", lambda *arguments: 1.0)
    monkeypatch.setattr(ppo, "metrics", metrics)
    own, grpo = (ppo.measure(tmp_path, name, 0) for name in found)
    assert (own.before, own.after, own.tokens, own.explained) == (0.4, 0.8, 400, 0.5)
    assert own.to_goal == pytest.approx(200 + 200 * 2 / 3) and grpo.to_goal == pytest.approx(150)
    assert "divided by GRPO's are 1.00 in total, and 2.22 until" in ppo.verdict(own, grpo)
    assert not ppo.is_good(own, grpo)
    found["ppo_letter_count"] = [0.4, 0.75, 0.8]
    assert ppo.is_good(ppo.measure(tmp_path, "ppo_letter_count", 0), grpo)
    found["ppo_letter_count"] = [0.4, 0.5, 0.6]
    assert not ppo.is_good(ppo.measure(tmp_path, "ppo_letter_count", 0), grpo)


def test_the_seconds_of_a_run_that_was_cut_short_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = load("cells", monkeypatch)
    config, clock = tmp_path / "c.yaml", iter([0.0, 5.0, 10.0, 17.0])
    config.write_text("")
    outcomes = iter([KeyboardInterrupt, None])

    limits = []

    def run(command: list[str], *, timeout: float | None, **options: object) -> None:
        limits.append(timeout)
        if outcome := next(outcomes):
            raise outcome

    monkeypatch.setattr(cells, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(cells, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with pytest.raises(KeyboardInterrupt):
        cells.trained(tmp_path / "run", config, [])
    assert cells.trained(tmp_path / "run", config, [], 90.0) == 12.0
    assert limits == [None, 90.0]
    assert cells.trained(tmp_path / "run", config, []) == 12.0  # left as it is
    (tmp_path / "sft.evaluation.json").write_text('{"seconds": 3}')
    assert cells.seconds_of(tmp_path) == 15.0
    with pytest.raises(SystemExit, match="made with other settings"):
        cells.trained(tmp_path / "run", config, ["run.seed=1"])


def test_the_page_says_how_it_was_measured(
    reproduce: ModuleType, joint_online: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = reproduce.results_page
    monkeypatch.setattr(page, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(page, "PAGE", tmp_path / "results.md")

    def cell(right: float) -> list[dict[str, object]]:
        both = {"accuracy": [right, 1.0], "no_answer_rate": [1 - right, 0.0], "completion_length": [10.0, 20.0]}
        return [{"greedy": both, "sampled": both, "chosen_logprob": -3.0}]

    names = ("SFT", *reproduce.CELLS, *reproduce.alpha_cells())
    cells = {name: cell(0.5) for name in names}
    result = {"seeds": [1], "problems": 2, "learning_rate": 3e-4, "why": "because", "seconds": 120.0}
    rows = {"rows": reproduce.rows_of(cells), "effects": reproduce.effects_of(cells)}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "ablation_letter_count.md").write_text("A note by hand.\n")
    page.keep("ablation_letter_count", result | rows)
    text = page.PAGE.read_text()
    for part in ("is 0.0003, because.", "2 minutes on 2 cores", "A note by hand.", "| +masking |", "| alpha 0.5 |"):
        assert part in text
    assert (tmp_path / "results" / "ablation_letter_count.png").stat().st_size > 0
    page.keep("ppo", {"lines": ["a line of PPO"]})
    assert "A note by hand." in page.PAGE.read_text() and "a line of PPO" in page.PAGE.read_text()


def test_the_page_tells_of_the_pairs(reproduce: ModuleType, tmp_path: Path) -> None:
    for seed, (chosen, prefix) in enumerate([(28, 0), (30, 12)], start=1):
        for kind in ("longest", "shortest"):
            folder = tmp_path / f"seed-{seed}" / "sft" / "pairs" / kind
            folder.mkdir(parents=True)
            tokens = {side: {"median": chosen, "max": prefix} for side in ("chosen", "rejected", "common_prefix")}
            report = {"rows": {"preferences": 1000 + seed}, "tokens": tokens}
            (folder / "report.json").write_text(json.dumps(report))
    shown = reproduce.pair_lines([tmp_path / "seed-1", tmp_path / "seed-2"])
    assert "by seed: 1,001, 1,002. Median tokens by seed: chosen side 28, 30" in shown[0] and "at most 12" in shown[1]
