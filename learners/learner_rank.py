"""One learner rank: trajectories, pairs and demonstrations in, one joint optimizer step after the other.

All ranks do the same calls at once. Each plans the whole of an update, deterministically, and runs its own share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from learners import weight_source
from learners.batching import MicroBatch, collate, plan_micro_batches, split_updates
from learners.deepspeed_engine import TrainedModel, join_process_group
from learners.logprobs import masked_token_logprobs
from learners.losses import LossOutput, value_loss
from learners.objective import Denominators, joint_loss, total, weighted
from learners.policy_model import load_critic, load_model, saved_config
from learners.rank_settings import RankSettings
from learners.rows import Row, Unit
from learners.step_sums import StepSums, norm_of_sums
from learners.step_units import critic_units, left_out, pair_score_rows, step_units, without_policy
from rlsys.errors import NonFiniteLossError
from rlsys.faults import fault
from rlsys.stage_settings import StageSettings, term_weights
from rlsys.types import Float32Array, Int32Array, Preference, TrainingBatch

Part = TypeVar("Part")
Forward = Callable[[MicroBatch], Tensor]


class LearnerRank:
    """The policy on one rank, with what is trained or kept beside it: critic and reference policy."""

    passes = 0  # of any model over a micro-batch, so far

    def __init__(self, settings: RankSettings) -> None:
        self.settings = settings
        self.policy: TrainedModel | None = None
        self.critic: TrainedModel | None = None
        self._reference: PreTrainedModel | None = None
        join_process_group(settings)

    # --- stages and files ---

    def start_stage(self, stage: StageSettings, policy: Path, resume: Path | None, reference: Path | None) -> None:
        """(Re)build the models from `policy`; with `resume`, a checkpoint, also what their optimizers hold."""
        self._release()
        self.stage = stage
        settings, (dtype, device) = self.settings, (self.settings.learner.dtype, self.settings.device)
        module = load_model(policy, dtype, device)
        config = saved_config(policy, dtype)
        self.policy = TrainedModel("policy", module, config, settings, stage.optimizer, stage.policy_updates)
        self.policy.restore(resume / "learner" if resume else None)
        if stage.critic:
            module = load_critic(resume / "critic" if resume else policy, dtype, device)
            self.critic = TrainedModel("critic", module, module.config, settings, stage.critic, stage.total_updates)
            self.critic.restore(resume / "critic_learner" if resume else None)
        if reference:
            self._reference = load_model(reference, dtype, device).eval()

    def _release(self) -> None:
        for model in (self.policy, self.critic):
            if model is not None:
                model.destroy()
        self.policy = self.critic = self._reference = None

    @property
    def _policy(self) -> TrainedModel:
        if self.policy is None:
            raise RuntimeError("start_stage comes first")
        return self.policy

    def save(self, folder: Path) -> None:
        """Write policy/ (a Hugging Face folder without the tokenizer), learner/ and the critic's. Collective."""
        self._policy.save(folder / "policy", folder / "learner")
        if self.critic is not None:
            self.critic.save(folder / "critic", folder / "critic_learner")

    def export(self, bucket_bytes: int) -> Iterator[tuple[Any, np.ndarray]]:
        """(bucket, bytes) of the whole policy, for the bus; ranks above 0 yield none.

        Collective: every rank must exhaust it.
        """
        tensors = weight_source.full_parameters(self._policy.module, self._policy.gather)
        if self.settings.rank == 0:
            yield from weight_source.pack(tensors, bucket_bytes)
        for _ in tensors:  # gathering needs every rank, packing and hashing only one
            pass

    @torch.no_grad()
    def score(self, rows: Sequence[Int32Array]) -> list[Float32Array]:
        """log p(token t+1 | tokens 0..t) of every row, [T-1] each, temperature 1. Collective under ZeRO 3."""
        found = []
        for row in rows:
            ids = torch.from_numpy(np.asarray(row, dtype=np.int64))[None].to(self.settings.device)
            logits = self._policy(input_ids=ids, use_cache=False).logits[:, :-1]
            mask = torch.ones_like(ids[:, 1:], dtype=torch.bool)
            found.append(masked_token_logprobs(logits, ids[:, 1:], mask, 1.0)[0].cpu().numpy())
        return found

    # --- training ---

    def train(self, batch: TrainingBatch, step: int, version: int) -> dict[str, float]:
        """One training step of the joint objective; answers with names of the metrics registry.

        Args:
            step: of the stage, from 0, for the weights of the terms. version: that it makes, for what is random in it.
        """
        fault("learner.step", version=version)
        seed, objective = self._reseed(version), self.settings.objective
        weights = term_weights(objective, self.stage, step)
        parts = step_units(
            batch,
            objective,
            weights,
            chosen_sft=self.stage.stage == "preference" or objective.sft.source == "chosen",
            kl_weight=objective.kl.weight_at(step, self.stage.steps)
            if objective.kl.in_reward
            else weights.get("kl", 0.0),
            max_tokens=self.settings.max_tokens,
            scorer=self,
        )
        deals = [split_updates(part, self.stage.updates_per_step, seed=seed) for part in parts]
        updates = [[unit for part in update for units in part for unit in units] for update in zip(*deals, strict=True)]
        if "policy" in weights:
            # The first update starts from the old policy itself; only the later ones need its log-probabilities kept.
            updates[1:] = [self._with_old(units) for units in updates[1:]]
        sums = StepSums(self.settings.device, tuple(weights))
        interval = objective.grad_norm_interval
        measured = bool(interval) and step % interval == 0
        made = [self._update(units, weights, sums, measured and not n) for n, units in enumerate(updates)]
        for term, weight in weights.items():
            sums.note(f"objective/{term}_weight", weight)
        preference = objective.preference
        if "preference" in weights and preference.source == "search" and preference.pairs == "steps":
            sums.note("preference/left_out", float(left_out(batch.groups)))
        return sums.reduce(sum(made))

    def _update(self, units: list[Unit], weights: dict[str, float], sums: StepSums, measured: bool) -> bool:
        """One optimizer update of every model; whether there was anything to update one with."""
        units, denominators = weighted(units, self.settings.objective.policy, self.settings.max_tokens)
        empty = _note_denominators(sums, denominators, weights)
        sums.note("learner/empty_terms", float(empty))
        # AdamW would move weights on without a gradient too, so a model without any target is left alone.
        moving: dict[str, TrainedModel] = {}
        if self.critic is not None and "value" in weights and denominators.value:
            self._critic_gradient(self.critic, critic_units(units), weights["value"], denominators.value, sums)
            moving["objective/value_grad_norm"] = self.critic
        if "policy" not in weights:
            units = without_policy(units)
        units = [unit for unit in units if any(row.targets.any() for row in unit.rows)]
        if units:
            self._policy_gradient(units, weights, sums, measured)
            moving["learner/grad_norm"] = self._policy
        fault("learner.update")
        for model in moving.values():
            model.check_finite()  # of all, before the first of them is updated
        for name, model in moving.items():
            norm, rate = model.update()
            sums.note(name, norm)
            if model is self._policy:
                sums.note("learner/learning_rate", rate)
        return bool(moving)

    def _policy_gradient(self, units: list[Unit], weights: dict[str, float], sums: StepSums, measured: bool) -> None:
        plan = self._plan(units)
        if measured:
            self._measure(plan, weights, sums)
        for batch in plan:
            logprobs, entropy = self._logprobs(self._policy, batch, entropy=True)
            terms = joint_loss(logprobs, entropy, batch, self.settings.objective)
            sums.add_pass(batch)
            for term, found in terms.items():
                sums.add_term(term, found, _count(batch, term), weights[term])
            self._policy.backward(total(terms, weights, logprobs), "joint loss")

    def _measure(self, plan: Sequence[MicroBatch], weights: dict[str, float], sums: StepSums) -> None:
        """Log the norm of every term's own gradient, in the last layer only: a forward pass and little more.

        The model itself runs, not DeepSpeed's engine, which would take the gradients for those of an update.
        """
        parameters = self._policy.last_layer()
        if not parameters:
            return
        norms = {
            term: [torch.zeros_like(found, dtype=torch.float32) for found in parameters]
            for term in weights
            if term != "value"
        }
        for batch in plan:
            logprobs, entropy = self._logprobs(self._policy.module, batch, entropy=True)
            for term, found in joint_loss(logprobs, entropy, batch, self.settings.objective).items():
                _add_gradient(norms[term], weights[term] * found.loss, parameters)
        _note_norms(sums, {term: norm_of_sums(parts) for term, parts in norms.items()})

    def _critic_gradient(
        self, critic: TrainedModel, units: list[Unit], weight: float, denominator: int, sums: StepSums
    ) -> None:
        _note_explained_variance(sums, [row for unit in units for row in unit.rows])
        for batch in self._plan(units):
            values, targets = self._values(batch), batch.policy
            if targets is None or targets.values is None or targets.returns is None:
                found = LossOutput(values.sum() * 0, {})
            else:
                each = torch.full_like(values, 1 / denominator)
                old, returns = targets.values.to(values), targets.returns.to(values)
                found = value_loss(values, old, returns, each, clip=self.settings.objective.value.clip)
            sums.add_term("value", found, len(values), weight)
            critic.backward(weight * found.loss, "value loss")

    # --- figures of tokens, from forward passes alone ---

    def old(self, rows: Sequence[Row]) -> list[Float32Array]:
        """[T] log-probabilities of the policy's own tokens under the present policy."""
        return self._score("log-probabilities of the policy", rows, self._logprobs_under(self._policy))

    def reference(self, rows: Sequence[Row]) -> list[Float32Array]:
        """The same under the reference policy."""
        return self._score("log-probabilities of the reference policy", rows, self._logprobs_under(self._reference))

    def values(self, rows: Sequence[Row]) -> list[Float32Array]:
        """[T], the critic's estimate before each of these tokens."""
        return self._score("values of the critic", rows, self._values)

    def score_pairs(self, pairs: Sequence[Preference]) -> list[tuple[float, float]]:
        """Scores of the chosen and the rejected side under the present policy, sums in nats. Collective."""
        return self._score_pairs("the policy", pairs, self._policy)

    def reference_pairs(self, pairs: Sequence[Preference]) -> list[tuple[float, float]]:
        """The same under the reference policy."""
        return self._score_pairs("the reference policy", pairs, self._reference)

    def _score_pairs(self, whose: str, pairs: Sequence[Preference], model: Any) -> list[tuple[float, float]]:
        rows = pair_score_rows(pairs, self.settings.objective)
        found = self._score(f"log-probabilities of preference pairs under {whose}", rows, self._logprobs_under(model))
        sums = [float(scores.sum(dtype=np.float64)) for scores in found]
        return list(zip(sums[0::2], sums[1::2], strict=True))

    def _with_old(self, units: list[Unit]) -> list[Unit]:
        """The rows of the policy term with their log-probabilities under the present policy, where they lack them."""
        rows = [row for unit in units for row in unit.rows if _lacks_old(row)]
        if not self.settings.objective.policy.decoupled or not rows:
            return units
        found = iter(self.old(rows))
        return [
            replace(unit, rows=tuple(_with_old(row, next(found)) if _lacks_old(row) else row for row in unit.rows))
            for unit in units
        ]

    @torch.no_grad()
    def _score(self, what: str, rows: Sequence[Row], forward: Forward) -> list[Float32Array]:
        """[T] float32 a row: a figure of every target of it, 0 elsewhere. Collective: every rank does its share.

        Raises:
            NonFiniteLossError: on all ranks, where a figure is not finite; names `what` was asked for.
        """
        if not rows:
            return []
        masks = [row.targets for row in rows]
        starts = np.cumsum([0, *(int(mask.sum()) for mask in masks)])
        flat = torch.zeros(int(starts[-1]), dtype=torch.float32, device=self.settings.device)
        units = [Unit(rows=(row,)) for row in rows]
        for numbers in self._shares(units):
            found = forward(self._collate([units[n] for n in numbers]))
            at = 0
            for n in numbers:
                size = int(starts[n + 1] - starts[n])
                flat[int(starts[n]) : int(starts[n + 1])] = found[at : at + size]
                at += size
        dist.all_reduce(flat)  # every target is one rank's: the others add 0
        values = flat.cpu().numpy()
        if bad := int((~np.isfinite(values)).sum()):
            raise NonFiniteLossError(f"{what}: {bad} of {len(values)} not finite; nothing was updated or published")
        scored = []
        for n, mask in enumerate(masks):
            row = np.zeros(len(mask), dtype=np.float32)
            row[mask] = values[starts[n] : starts[n + 1]]
            scored.append(row)
        return scored

    # --- forward passes ---

    def _logprobs_under(self, model: Any) -> Forward:
        return lambda batch: self._logprobs(model, batch, entropy=False)[0]

    def _plan(self, units: Sequence[Unit]) -> list[MicroBatch]:
        return [self._collate([units[n] for n in numbers]) for numbers in self._shares(units)]

    def _shares(self, units: Sequence[Unit]) -> list[list[int]]:
        """Numbers of the units in each pass of this rank."""
        plan = plan_micro_batches(
            [unit.length for unit in units],
            ranks=self.settings.ranks,
            budget_tokens=self.settings.learner.micro_batch_tokens,
            heights=[len(unit.rows) for unit in units],
        )
        return plan[self.settings.rank]

    def _collate(self, units: Sequence[Unit]) -> MicroBatch:
        return _moved(collate(units, self.settings.pad_token_id), self.settings.device)

    def _logprobs(self, model: Any, batch: MicroBatch, *, entropy: bool) -> tuple[Tensor, Tensor]:
        """[N] log-probabilities of the targets: those of the policy term as they were sampled; [M] entropies of these.

        entropy: False where nobody asks for them, M = 0.
        """
        self.passes += 1
        ids, mask = batch.input_ids, batch.loss_mask[:, batch.first_target :]
        # Right padding needs no attention mask under causal attention: no real token looks at it.
        keep = ids.shape[1] - batch.first_target
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits[:, :-1]
        temperature: float | Tensor = 1.0
        if batch.policy is not None and self.settings.temperature != 1:
            temperature = torch.ones(batch.targets, device=ids.device)
            temperature[batch.policy.at] = self.settings.temperature
        return masked_token_logprobs(
            logits,
            ids[:, batch.first_target + 1 :],
            mask,
            temperature,
            entropy_at=batch.policy.at if entropy and batch.policy is not None else None,
            entropy_gradient=self.settings.objective.policy.entropy_coef > 0,
        )

    def _values(self, batch: MicroBatch) -> Tensor:
        """[N], the critic's estimate of the return from before each target on."""
        self.passes += 1
        assert self.critic is not None  # noqa: S101 - the objective has one
        values = self.critic(input_ids=batch.input_ids, use_cache=False).logits[:, :-1, 0].float()
        return values[batch.loss_mask]

    def _reseed(self, version: int) -> int:
        """Make whatever is random in a step (shuffles) a function of seed and version: nothing to save."""
        torch.manual_seed(_seed(self.settings.seed, version, self.settings.rank))
        return _seed(self.settings.seed, version)


def _lacks_old(row: Row) -> bool:
    return row.policy is not None and row.policy.old_logprobs is None


def _with_old(row: Row, found: Float32Array) -> Row:
    return replace(row, policy=replace(row.policy, old_logprobs=found)) if row.policy else row


def _count(batch: MicroBatch, term: str) -> int:
    """Targets of a term in a micro-batch, or pairs."""
    if term == "preference":
        return len(batch.pairs.weights) if batch.pairs else 0
    targets = batch.sft if term == "sft" else batch.policy
    return len(targets.at) if targets else 0


def _note_denominators(sums: StepSums, found: Denominators, weights: dict[str, float]) -> int:
    """Log what every term is divided by; how many terms have nothing in this update."""
    by_term = {"policy": found.policy, "kl": found.policy, "value": found.value, "sft": found.sft}
    by_term["preference"] = found.pairs
    for term in weights:
        sums.note(f"objective/{term}_denominator", float(by_term[term]))
    return sum(not by_term[term] for term in weights)


def _add_gradient(parts: Sequence[Tensor], loss: Tensor, parameters: Sequence[Tensor]) -> None:
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    for part, gradient in zip(parts, found, strict=True):
        if gradient is not None:
            part += gradient


def _note_norms(sums: StepSums, norms: dict[str, float]) -> None:
    for term, norm in norms.items():
        sums.note(f"objective/{term}_grad_norm", norm)
        sums.note(f"objective/{term}_grad_share", norm / sum(norms.values()) if sum(norms.values()) else 0.0)


def _note_explained_variance(sums: StepSums, rows: Sequence[Row]) -> None:
    """1 - Var(return - value) / Var(return), of the values at the start of the step: the same on all ranks."""
    tokens = [row.policy for row in rows if row.policy and row.policy.returns is not None]
    returns, values = (
        np.concatenate([getattr(found, name)[found.mask] for found in tokens]).astype(np.float64)
        for name in ("returns", "values")
    )
    if returns.var() > 0:
        sums.note("value/explained_variance", float(1 - (returns - values).var() / returns.var()))
    sums.note("value/mean", float(values.mean()))


def _moved(part: Part, device: str) -> Part:
    """A dataclass of tensors, with those of dataclasses in it, on a device."""
    found: dict[str, Any] = {}
    for field in fields(part):  # type: ignore[arg-type]
        value = getattr(part, field.name)
        if isinstance(value, Tensor):
            found[field.name] = value.to(device)
        elif hasattr(value, "__dataclass_fields__"):
            found[field.name] = _moved(value, device)
    return replace(part, **found)  # type: ignore[type-var]


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
