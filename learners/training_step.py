"""The optimizer updates of one training step on one rank."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from learners.deepspeed.engine import TrainedModel
from learners.forward import ForwardPasses
from learners.objective.joint import joint_loss, total_loss, weigh_items
from learners.objective.losses import LossOutput, value_loss
from learners.samples.batching import MicroBatch
from learners.samples.build import critic_items, without_policy
from learners.samples.signal import changes_weights
from learners.samples.types import PackItem
from learners.settings import RankSettings
from learners.step_metrics import StepMetrics, summed_gradient_norm
from learners.token_values import TokenRecorder
from rlsys.fault_injection import fault


@dataclass(frozen=True, slots=True)
class UpdateContext:
    """Position of an update in the run.

    Attributes:
        version: weight version that the training step makes.
        update: number of the update in the training step, from 0.
        measures_gradients: whether to log the gradient norm of every term.
    """

    version: int
    update: int
    measures_gradients: bool

    @property
    def fault_tags(self) -> dict[str, int]:
        """Return the tags of the fault points in this update."""
        return {"version": self.version, "update": self.update}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingStep:
    """Models, term weights and metrics of the updates of one training step.

    Attributes:
        critic: None if the objective has no value term.
        weights: weight of each term in this step.
        tokens: records the values of the tokens of some trajectories.
        interpolation: share of the teacher in this step; see `learners.objective.distillation`.
        teacher: the teacher of the whole vocabulary, which is not used for another divergence.
    """

    settings: RankSettings
    forward: ForwardPasses
    policy: TrainedModel
    critic: TrainedModel | None
    weights: Mapping[str, float]
    metrics: StepMetrics
    tokens: TokenRecorder
    interpolation: float = 1.0
    teacher: Any = None

    @property
    def models(self) -> list[TrainedModel]:
        """Models that the step may update."""
        critic = [self.critic] if self.critic is not None and "value" in self.weights else []
        return [*critic, self.policy] if self.weights.keys() - {"value"} else critic

    def update(self, items: list[PackItem], context: UpdateContext) -> bool:
        """Make one optimizer update of every model that has targets. Collective.

        Args:
            items: all items of the update, of all ranks.
            context: position of the update in the run.

        Returns:
            Whether any model was updated.

        Raises:
            NonFiniteLossError: on all ranks, if a loss, gradient or gradient norm is not finite on one.
        """
        objective = self.settings.objective
        items, denominators = weigh_items(
            items, objective.policy, self.settings.max_tokens, objective.distill.on_policy_share
        )
        self.metrics.note_denominators(denominators)
        if "distill" in self.weights and objective.distill.interpolation < 1:
            self.metrics.note("distill/interpolation", self.interpolation)
        # AdamW also moves weights without a gradient, so a model without targets must not be updated.
        updated: dict[str, TrainedModel] = {}  # by the metric name of the gradient norm
        if self.critic is not None and "value" in self.weights and denominators.value:
            self._critic_gradient(self.critic, critic_items(items), denominators.value, context)
            updated["objective/value_grad_norm"] = self.critic
        if "policy" not in self.weights:
            items = without_policy(items)
        items = [item for item in items if any(sample.targets.any() for sample in item.samples)]
        if items:
            trained = [item for item in items if changes_weights(item, self.weights, objective)]
            self.metrics.note("learner/left_out_share", 1 - len(trained) / len(items))
            self.tokens.note_items(items, trained)
            self._policy_gradient(trained, context)  # without any, its gradient is 0 and AdamW moves on
            updated["learner/grad_norm"] = self.policy
        fault("learner.update", **context.fault_tags)
        for model in updated.values():
            model.check_finite()  # of all models, before any of them is updated
        for name, model in updated.items():
            fault("learner.optimizer", **context.fault_tags, model=model.name)
            norm, rate = model.update()
            self.metrics.note(name, norm)
            if model is self.policy:
                self.metrics.note("learner/learning_rate", rate)
        return bool(updated)

    def _policy_gradient(self, items: list[PackItem], context: UpdateContext) -> None:
        shares = self.forward.shares(items)
        batches = [self.forward.collate(items, share) for share in shares]
        # The output layer of the teacher is also needed in the backward pass, which computes parts again.
        whole = self.settings.objective.distill.divergence == "whole" and "distill" in self.weights
        with self.teacher.in_use() if whole else contextlib.nullcontext():
            if context.measures_gradients:
                self._measure_gradient_norms(batches)
            for share, batch in zip(shares, batches, strict=True):
                logprobs, terms = self._terms(self.policy, batch)
                self.metrics.add_pass(batch)
                self.tokens.add_pass([items[number] for number in share.numbers], logprobs)
                for term, output in terms.items():
                    self.metrics.add_term(term, output, batch.count(term), self.weights[term])
                loss = total_loss(terms, self.weights, logprobs)
                self.policy.backward(loss, "joint loss", context.fault_tags)

    def _terms(self, model: Any, batch: MicroBatch) -> tuple[Tensor, dict[str, LossOutput]]:
        """Return the log-probabilities of a pass, [N], and the losses by term."""
        tokens = self.forward.others(batch, self.teacher, self.interpolation)
        logprobs, entropy, others, softened = self.forward.logprobs(model, batch, entropy=True, others=tokens)
        objective = self.settings.objective
        return logprobs, joint_loss(logprobs, entropy, batch, objective, others, self.interpolation, softened)

    def _measure_gradient_norms(self, batches: Sequence[MicroBatch]) -> None:
        """Log the norm of every term's gradient in the last layer.

        The last layer alone costs little more than a forward pass. The bare model computes it, because DeepSpeed's
        engine would add the gradients to the update.
        """
        parameters = self.policy.last_layer()
        if not parameters:
            return
        gradients = {
            term: [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
            for term in self.weights
            if term != "value"
        }
        for batch in batches:
            for term, output in self._terms(self.policy.bare, batch)[1].items():
                _add_gradient(gradients[term], self.weights[term] * output.loss, parameters)
        self.metrics.note_gradient_norms({term: summed_gradient_norm(parts) for term, parts in gradients.items()})

    def _critic_gradient(
        self, critic: TrainedModel, items: list[PackItem], denominator: int, context: UpdateContext
    ) -> None:
        self.metrics.note_explained_variance([sample for item in items for sample in item.samples])
        weight = self.weights["value"]
        for batch in self.forward.micro_batches(items):
            values, targets = self.forward.values(critic, batch), batch.policy
            if targets is None or targets.values is None or targets.returns is None:
                output = LossOutput(values.sum() * 0, {})
            else:
                token_weights = torch.full_like(values, 1 / denominator)
                old, returns = targets.values.to(values), targets.returns.to(values)
                output = value_loss(values, old, returns, token_weights, clip=self.settings.objective.value.clip)
            self.metrics.add_term("value", output, len(values), weight)
            critic.backward(weight * output.loss, "value loss", context.fault_tags)


def _add_gradient(sums: Sequence[Tensor], loss: Tensor, parameters: Sequence[Tensor]) -> None:
    """Add the gradient of a loss to running sums, one sum per parameter."""
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    for total, gradient in zip(sums, gradients, strict=True):
        if gradient is not None:
            total += gradient
