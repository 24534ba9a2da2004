"""One command trains through Ray, vLLM, two DeepSpeed ranks and the weight-sync bus."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import numpy as np
import pytest
from real_runs import BEGINS, LOOPBACK, PREFERENCE, SFT, WARM, FinishedRun, last_checkpoint
from real_searches import wait_until

from rlsys.commands import export
from rlsys.config.files import load_config
from rlsys.models.folder import load_tokenizer, weights_digest
from rlsys.run.metrics import HISTOGRAMS, METRICS, read_rows
from rlsys.run.policies import find_run_policy
from rlsys.run.rollout_files import read_rollouts
from rlsys.run.status import read_status

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
LARGEST_GAP = 5e-4
HELD_OUT = "held_out/greedy_accuracy"
OURS = re.compile(
    r"starting from the initial model$|probe gap of a fresh load |stage (warm_start|sft|preference|online): step |"
    r"(warm_start|sft|preference|online) \d+/\d+  |trees \d+/\d+  |trees: 0 of \d+ are finished$|"
    r"extracting the data of the trees$|(sft: \d+ rows|preference: \d+ pairs)$|scoring the preference pairs under |"
    r"evaluation  |waiting for |checkpoint |(run directory|held-out|evaluate|export|continue): "
)


def test_metrics_have_a_row_for_every_step(finished_run: FinishedRun) -> None:
    rows = read_rows(finished_run.dir / "metrics.jsonl")
    expected = [
        *[("warm_start", step, step) for step in range(1, WARM + 1)],
        ("search", 0, WARM),
        *[("sft", step, WARM + step) for step in range(1, SFT + 1)],
        *[("preference", step, WARM + SFT + step) for step in range(1, PREFERENCE + 1)],
        # Step 0 of the online stage is the evaluation of the policy it starts from.
        *[("online", step, BEGINS + step) for step in range(11)],
    ]
    assert [(row["stage"], row["step"], row["weights/version"]) for row in rows] == expected
    assert all(set(row) - {"stage", "step"} <= set(METRICS) for row in rows)


def test_the_online_stage_learns_from_mixed_rewards(finished_run: FinishedRun) -> None:
    rows = [row for row in read_rows(finished_run.dir / "metrics.jsonl") if row["stage"] == "online"][1:]
    assert any(0 < row["rollout/reward"] < 1 for row in rows)
    assert any(row["learner/grad_norm"] > 0 for row in rows)
    assert any(row["learner/kl"] > 0 for row in rows)
    assert all(row["learner/updates"] == 2 and row["rollout/staleness_max"] == 0 for row in rows)
    # 8 groups of 4; every completion has at least its end token and at most max_tokens.
    assert all(32 <= row["rollout/tokens"] <= 32 * 40 for row in rows)


def test_actor_and_learner_agree_after_every_publish(finished_run: FinishedRun) -> None:
    rows = [row for row in read_rows(finished_run.dir / "metrics.jsonl") if row["stage"] == "online"][1:]
    for name in ("weights/probe_gap_max", "learner/logprob_gap_max"):
        gaps = [row[name] for row in rows]
        assert max(gaps) <= LARGEST_GAP
        assert max(gaps) > 0  # two different programs never agree to the last bit: zero would mean no comparison


def test_rollouts_of_every_online_step_are_kept(finished_run: FinishedRun) -> None:
    run = finished_run.dir
    kept = read_rollouts(run, 0)
    online = {row["weights/version"]: row for row in read_rows(run / "metrics.jsonl") if row["stage"] == "online"}
    assert sorted(kept) == sorted(online)[1:]
    decode = load_tokenizer(run / "stages" / "online").decode
    for rows in kept.values():
        assert len({row["prompt_id"] for row in rows}) == 2
        for row in rows:
            assert decode(row["token_ids"], skip_special_tokens=False) == row["completion"]
            assert 0 < row["tokens"] == len(row["logprobs"]) <= 40 and max(row["logprobs"]) <= 0


def test_kept_rollouts_have_the_advantages_and_gaps_of_the_step(finished_run: FinishedRun) -> None:
    run, seen = finished_run.dir, set()
    figures = {row["weights/version"]: row for row in read_rows(run / "metrics.jsonl") if row["stage"] == "online"}
    for version, rows in read_rollouts(run, 0).items():
        for row in rows:
            seen.add(row["untrained"])
            # The KL loss trains equal rewards too, with advantages of 0, so every judged completion has numbers.
            if row["searched"] or row["untrained"]:
                continue
            trained = [logprob is not None for logprob in row["logprobs"]]
            assert [value is not None for value in row["advantages"]] == trained
            assert len(set(row["advantages"]) - {None}) == 1, "grpo gives every token of a completion the same"
            sign = row["reward"] - row["group_reward"]
            assert max(row["advantages"], key=abs) * sign > 0 or abs(sign) < 1e-9
            gaps = [abs(gap) for gap in row["gaps"] if gap is not None]
            assert max(gaps) <= figures[version]["learner/logprob_gap_max"] * 1.01  # gaps have three digits
    assert "" in seen


def test_run_directory(finished_run: FinishedRun) -> None:
    run = finished_run.dir
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "logs", "stages", "model"} <= names
    assert [name for name in names if name.startswith(".")] == []  # scratch files are gone
    assert load_config(run / "config.yaml") == load_config(finished_run.config)
    assert sorted(path.name for path in (run / "logs").iterdir()) == [
        "actor-0.log",
        "actor-1.log",
        "driver.log",
        "learner-0.log",
        "learner-1.log",
        "ray.log",
    ]
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step_000065", "step_000070"]
    for stage in ("warm_start", "sft", "preference", "online"):
        assert (run / "stages" / stage / "model.safetensors").is_file()


def test_every_line_of_output_is_ours(finished_run: FinishedRun) -> None:
    lines = finished_run.command.stdout.splitlines()
    assert len(lines) > 10
    assert [line for line in lines if not OURS.match(line)] == []
    assert finished_run.command.stderr == ""
    log = (finished_run.dir / "logs" / "ray.log").read_text()
    assert "Started a local Ray instance" in log
    assert "worker died" not in log  # all processes left before Ray did


def test_status_knows_the_end_and_the_pace(finished_run: FinishedRun) -> None:
    status = read_status(finished_run.dir)
    assert (status.state, status.weight_version) == ("finished", 70)
    assert all(done == total for done, total in status.stages.values())
    assert status.heartbeat is not None and status.heartbeat.end == "finished"
    assert status.heartbeat.time > status.heartbeat.started
    assert status.throughput is not None and status.throughput.present is not None
    assert all(0 < status.throughput.shares[part] < 1 for part in ("wait", "learn", "publish"))
    assert status.last_error is None


def test_tensorboard_holds_the_same_numbers(finished_run: FinishedRun) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished_run.dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    found = {
        (name, event.step, np.float32(event.value))
        for name in events.Tags()["scalars"]
        for event in events.Scalars(name)
    }
    assert set(HISTOGRAMS) <= set(events.Tags()["histograms"])
    samples = events.Tensors("rollout/samples")[0].tensor_proto.string_val[0].decode()
    assert "**prompt** train-" in samples and "tokens" in samples
    rows = read_rows(finished_run.dir / "metrics.jsonl")
    expected = {
        (name, row["weights/version"], np.float32(value))
        for row in rows
        for name, value in row.items()
        if name not in ("stage", "step")
    }
    assert found == expected


def test_checkpointed_policy_opens_as_a_hugging_face_model(finished_run: FinishedRun) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy = last_checkpoint(finished_run.dir) / "policy"
    model, info = AutoModelForCausalLM.from_pretrained(policy, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(policy)
    messages = [{"role": "user", "content": "count a in abab"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    with torch.no_grad():
        text = tokenizer.decode(model.generate(ids, do_sample=False, max_new_tokens=40)[0, ids.shape[1] :])
    assert re.search(r"<answer>\d</answer>", text)


def test_the_policy_of_every_stage_can_be_exported_with_its_own_figures(
    finished_run: FinishedRun, tmp_path: Path
) -> None:
    rows = {row["weights/version"]: row for row in read_rows(finished_run.dir / "metrics.jsonl") if HELD_OUT in row}
    for stage, version in (("warm_start", WARM), ("online", BEGINS + 10)):
        export.run(find_run_policy(str(finished_run.dir), stage), tmp_path / stage)
        card = (tmp_path / stage / "README.md").read_text()
        assert f"| weight version | {version} training steps in all |" in card
        accuracy = f"| greedy accuracy | {rows[version][HELD_OUT]:.3f} |" if version in rows else "did not measure"
        assert accuracy in card
        assert weights_digest(tmp_path / stage) == weights_digest(finished_run.dir / "stages" / stage)


def test_everything_listens_on_loopback(finished_run: FinishedRun) -> None:
    seen = finished_run.command.seen
    assert any("gcs_server" in name for name in seen.names) and any("LearnerActor" in name for name in seen.names)
    assert seen.listening  # Ray's own services at least
    assert [address for address in sorted(seen.listening) if not LOOPBACK.fullmatch(address[0])] == []


def test_an_actor_has_no_child_but_its_verifiers(finished_run: FinishedRun) -> None:
    # A process seen once may be a fork that has not become its own program yet, or a look at the hardware. vLLM looks
    # at a class of models in a process of its own, which takes long on a machine that has never done so.
    lasting = [lines[-1] for lines in finished_run.command.seen.actor_children.values() if len(lines) > 2]
    expected = ("verifiers.worker", "vllm.model_executor.models.registry")
    assert any(expected[0] in line for line in lasting)
    assert [line for line in lasting if not any(name in line for name in expected)] == []


def test_nothing_is_left_after_the_end(finished_run: FinishedRun) -> None:
    assert finished_run.left == []
    folders = finished_run.command.seen.ray_folders
    assert folders and [folder for folder in folders if Path(folder).exists()] == []


@pytest.mark.long
def test_evaluate_repeats_the_last_evaluation_of_the_run(finished_run: FinishedRun, start, tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    command = start("evaluate", str(finished_run.dir), "--output", str(output)).finish()
    command.assert_gone(within_s=5)
    assert re.fullmatch(r"\S+: policy of the finished stage online\nstarting 2 actors on \S+\n", command.stderr)
    assert "Ray" not in command.stdout
    figures = json.loads(output.read_text())
    row = read_rows(finished_run.dir / "metrics.jsonl")[-1]
    # The same problems, seeds and weights, loaded from files instead of published.
    assert figures["problems"] == 16
    assert figures["greedy"]["accuracy"]["mean"] == pytest.approx(row["held_out/greedy_accuracy"], abs=1e-12)
    assert figures["sampled"]["accuracy"]["mean"] == pytest.approx(row["held_out/sampled_accuracy"], abs=1e-12)
    assert figures["pass_at_k"]["2"]["mean"] == pytest.approx(row["held_out/pass_at_k"], abs=1e-12)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_an_interrupted_comparison_ends_with_the_same_bytes(finished_run: FinishedRun, start, tmp_path: Path) -> None:
    models = (str(finished_run.dir / "stages" / "warm_start"), str(finished_run.dir))
    whole, cut = tmp_path / "whole.json", tmp_path / "cut.json"
    command = start("evaluate", *models, "--output", str(whole)).finish()
    command.assert_gone(within_s=5)
    first = start("evaluate", *models, "--output", str(cut))
    wait_until(first, lambda: any(tmp_path.glob("cut.json.parts/*.json")))
    first.signal(signal.SIGINT, group=False)
    assert first.fail(128 + signal.SIGINT).endswith(
        "stopped by SIGINT; finished parts are kept, the same command continues\n"
    )
    first.assert_gone(within_s=15)
    assert not cut.exists()
    second = start("evaluate", *models, "--output", str(cut)).finish()
    assert "kept from an earlier evaluation" in second.stderr
    assert cut.read_bytes() == whole.read_bytes()
    document = json.loads(cut.read_text())
    assert [result["model"]["name"] for result in document["results"]] == list(models)
    assert document["comparisons"][0]["same_tokenizer"]
