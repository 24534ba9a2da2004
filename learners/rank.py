"""One learner rank: trajectories, pairs and demonstrations in, one joint optimizer step after the other.

All ranks do the same calls at once. Each plans the whole of an update, deterministically, and runs its own share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from learners.deepspeed import parameters as weight_source
from learners.deepspeed.collective_errors import together
from learners.deepspeed.engine import TrainedModel, join_process_group
from learners.deepspeed.model import load_critic, load_model, saved_config
from learners.deepspeed.rollback import undone_unless_finite
from learners.objective.joint import joint_loss, total, weighted
from learners.objective.logprobs import masked_token_logprobs
from learners.objective.losses import LossOutput, value_loss
from learners.samples.batching import MicroBatch, collate, moved, plan_micro_batches, split_updates
from learners.samples.build import critic_units, left_out, pair_score_rows, step_units, without_policy
from learners.samples.types import Row, Unit, lacks_old, with_old
from learners.settings import RankSettings
from learners.step_metrics import StepSums, norm_of_sums
from learners.step_notes import count_of, note_denominators, note_explained_variance, note_norms
from rlsys.config.stages import StageSettings, term_weights
from rlsys.errors import LearnerLostError, NonFiniteLossError
from rlsys.fault_injection import fault
from rlsys.types import Float32Array, Int32Array, Preference, TrainingBatch, WeightBucket

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
        """(Re)build the models from `policy`; with `resume`, a checkpoint, also what their optimizers hold.

        Raises:
            LearnerLostError: on all ranks, where one could not read a model.
            CheckpointError: on all ranks, where one could not read what the optimizers hold.
        """
        self._release()
        self.stage = stage
        settings, dtype, resumed = self.settings, self.settings.learner.dtype, resume or Path()
        module, config = self._loaded(load_model, policy), saved_config(policy, dtype)
        self.policy = TrainedModel("policy", module, config, settings, stage.optimizer, stage.policy_updates)
        self.policy.restore(resumed / "learner" if resume else None)
        if stage.critic:
            module = self._loaded(load_critic, resumed / "critic" if resume else policy)
            self.critic = TrainedModel("critic", module, module.config, settings, stage.critic, stage.total_updates)
            self.critic.restore(resumed / "critic_learner" if resume else None)
        if reference:
            self._reference = self._loaded(load_model, reference).eval()

    def _loaded(self, load: Callable[[Path, str, str], PreTrainedModel], folder: Path) -> PreTrainedModel:
        """The model of a folder, where every rank can read it: what follows needs all of them."""
        with together(LearnerLostError, self.settings.device):
            return load(folder, self.settings.learner.dtype, self.settings.device)

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
        """Write policy/ (a Hugging Face folder without the tokenizer), learner/ and the critic's. Collective.

        Raises:
            CheckpointError: on all ranks, where one could not write. Training goes on as if nothing had been tried.
        """
        self._policy.save(folder / "policy", folder / "learner")
        if self.critic is not None:
            self.critic.save(folder / "critic", folder / "critic_learner")

    def export(self, bucket_bytes: int, put: Callable[[np.ndarray], Any]) -> list[tuple[WeightBucket, Any]]:
        """Hand the bytes of the whole policy to `put`, bucket by bucket, on rank 0. Collective.

        Returns:
            Every bucket with what `put` answered; nothing on other ranks.
        Raises:
            LearnerLostError: on all ranks, where a bucket could not be made or put away.
        """
        tensors = weight_source.full_parameters(self._policy.module, self._policy.gather)
        found = []
        with together(LearnerLostError, self.settings.device):
            try:
                if self.settings.rank == 0:
                    found = [(bucket, put(data)) for bucket, data in weight_source.pack(tensors, bucket_bytes)]
            finally:
                for _ in tensors:  # gathering needs every rank, packing and hashing only one
                    pass
        return found

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
        Raises:
            NonFiniteLossError: on all ranks, where a score, loss, gradient or gradient norm of any update is not finite
                on one. Weights, moments and counters are then those from before the call, bit for bit, and the next
                call does what it would have done without this one. For that a step of several updates, or of two
                models, keeps `Copies` of the models that it moves; one update of one model needs none.
        """
        fault("learner.step", version=version)
        seed, objective = self._reseed(version), self.settings.objective
        weights = term_weights(objective, self.stage, step)
        parts = step_units(
            batch,
            objective,
            weights,
            chosen_sft=self.stage.sft_on_chosen(objective),
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
        made = 0
        with undone_unless_finite(self._moved_by(weights), len(updates)):
            for number, units in enumerate(updates):
                self._at = {"version": version, "update": number}
                made += self._update(units, weights, sums, measured and not number)
        for term, weight in weights.items():
            sums.note(f"objective/{term}_weight", weight)
        preference = objective.preference
        if "preference" in weights and preference.source == "search" and preference.pairs == "steps":
            sums.note("preference/left_out", float(left_out(batch.groups)))
        return sums.reduce(made)

    def _moved_by(self, weights: dict[str, float]) -> list[TrainedModel]:
        """The models that a step with these terms may update."""
        critic = [self.critic] if self.critic is not None and "value" in weights else []
        return [*critic, self._policy] if weights.keys() - {"value"} else critic

    def _update(self, units: list[Unit], weights: dict[str, float], sums: StepSums, measured: bool) -> bool:
        """One optimizer update of every model; whether there was anything to update one with."""
        units, denominators = weighted(units, self.settings.objective.policy, self.settings.max_tokens)
        empty = note_denominators(sums, denominators, weights)
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
        fault("learner.update", **self._at)
        for model in moving.values():
            model.check_finite()  # of all, before the first of them is updated
        for name, model in moving.items():
            fault("learner.optimizer", **self._at, model=model.name)
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
                sums.add_term(term, found, count_of(batch, term), weights[term])
            self._policy.backward(total(terms, weights, logprobs), "joint loss", self._at)

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
        note_norms(sums, {term: norm_of_sums(parts) for term, parts in norms.items()})

    def _critic_gradient(
        self, critic: TrainedModel, units: list[Unit], weight: float, denominator: int, sums: StepSums
    ) -> None:
        note_explained_variance(sums, [row for unit in units for row in unit.rows])
        for batch in self._plan(units):
            values, targets = self._values(batch), batch.policy
            if targets is None or targets.values is None or targets.returns is None:
                found = LossOutput(values.sum() * 0, {})
            else:
                each = torch.full_like(values, 1 / denominator)
                old, returns = targets.values.to(values), targets.returns.to(values)
                found = value_loss(values, old, returns, each, clip=self.settings.objective.value.clip)
            sums.add_term("value", found, len(values), weight)
            critic.backward(weight * found.loss, "value loss", self._at)

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
        rows = [row for unit in units for row in unit.rows if lacks_old(row)]
        if not self.settings.objective.policy.decoupled or not rows:
            return units
        found = iter(self.old(rows))
        return [
            replace(unit, rows=tuple(with_old(row, next(found)) if lacks_old(row) else row for row in unit.rows))
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
        return moved(collate(units, self.settings.pad_token_id), self.settings.device)

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


def _add_gradient(parts: Sequence[Tensor], loss: Tensor, parameters: Sequence[Tensor]) -> None:
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    for part, gradient in zip(parts, found, strict=True):
        if gradient is not None:
            part += gradient


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
