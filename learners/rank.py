"""One learner rank: turns trajectories, pairs and demonstrations into training steps of the joint objective.

All ranks make the same calls at once. Each rank computes the same plan for the whole update and runs its own share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from learners.deepspeed.adapter import AdapterReference, load_policy, policy_config
from learners.deepspeed.collective_errors import fail_on_all_ranks
from learners.deepspeed.critic import load_critic
from learners.deepspeed.engine import TrainedModel, join_process_group
from learners.deepspeed.model import load_model
from learners.deepspeed.model_files import restore_model, save_model
from learners.deepspeed.parameters import published_tensors
from learners.deepspeed.partition import restart_numbers
from learners.deepspeed.reference import ReferencePolicy
from learners.deepspeed.rollback import rollback_on_non_finite
from learners.forward import ForwardPasses
from learners.plugins import check_plugins
from learners.samples.build import StepTerms, build_samples, count_dropped_step_pairs
from learners.samples.masking import ThoughtMask
from learners.samples.planning import split_updates
from learners.samples.signal import policy_changes_weights
from learners.samples.types import PackItem, Sample, lacks_old_logprobs, with_old_logprobs
from learners.scoring import RankScorer
from learners.settings import RankSettings
from learners.step_metrics import StepMetrics
from learners.token_values import TokenRecorder
from learners.training_step import TrainingStep, UpdateContext
from rlsys.config.stages import StageSettings, term_weights
from rlsys.directory import CheckpointDirectory
from rlsys.errors import ConfigError, LearnerLostError
from rlsys.fault_injection import fault
from rlsys.interfaces import TokenValues, WeightSender
from rlsys.types import Float32Array, Int32Array, Preference, TrainingBatch
from rlsys.weight_types import WeightManifest

Module = TypeVar("Module", bound=nn.Module)


class LearnerRank:
    """Policy, critic, reference policy and teacher on one rank."""

    def __init__(self, settings: RankSettings) -> None:
        self.settings = settings
        self.policy: TrainedModel | None = None
        self.critic: TrainedModel | None = None
        self.reference: ReferencePolicy | AdapterReference | None = None
        self.teacher: ReferencePolicy | None = None
        self.forward = ForwardPasses(settings)
        self.asleep = False
        self._token_values: list[TokenValues | None] = []
        join_process_group(settings)

    @property
    def passes(self) -> int:
        """Number of forward passes over micro-batches so far, of all models."""
        return self.forward.passes

    # --- stages and files ---

    def start_stage(self, stage: StageSettings, policy: Path, resume: Path | None, reference: Path | None) -> None:
        """Build the models of a stage. Collective.

        Args:
            stage: settings of the stage.
            policy: model folder of the policy, or of its adapter.
            resume: checkpoint folder whose critic and optimizer states are restored; None starts them anew.
            reference: model folder of the reference policy; None if no term needs one.

        Raises:
            LearnerLostError: on all ranks, if one cannot read a model.
            ConfigError: on all ranks, if a model folder or a function of the user cannot be used.
            CheckpointError: on all ranks, if one cannot read the state of an optimizer.
        """
        check_plugins(self.settings.objective)
        self._release()
        self.stage = stage
        settings, resumed = self.settings, CheckpointDirectory(resume or Path())
        module = _loaded(settings, partial(load_policy, settings), policy)
        config = policy_config(settings, module, policy)
        self.policy = TrainedModel("policy", module, config, settings, stage.optimizer, stage.policy_updates)
        restore_model(self.policy, resumed.learner if resume else None)
        if stage.critic:
            critic = _loaded(settings, partial(load_critic, saved=resumed.critic if resume else None), policy)
            self.critic = TrainedModel("critic", critic, critic.config, settings, stage.critic, stage.total_updates)
            restore_model(self.critic, resumed.critic_learner if resume else None)
        if reference:
            self.reference = self._reference(reference)
        if stage.whole_teacher and settings.teacher:
            self.teacher = self._frozen(settings.teacher)
        self.forward.describe(module, self.teacher.module if self.teacher else None)

    def _reference(self, folder: Path) -> ReferencePolicy | AdapterReference:
        if self.settings.lora is None:
            return self._frozen(folder)
        with fail_on_all_ranks(LearnerLostError, self.settings.device):
            reference = AdapterReference(self._policy, folder)
        return reference

    def _frozen(self, folder: Path) -> ReferencePolicy:
        return ReferencePolicy(_loaded(self.settings, load_model, folder), self.settings)

    def _release(self) -> None:
        for model in (self.policy, self.critic, self.reference, self.teacher):
            if model is not None:
                model.destroy()
        self.policy = self.critic = self.reference = self.teacher = None
        if self.settings.learner.zero_stage == 3:
            restart_numbers()

    def sleep(self) -> None:
        """Move all states to the host, so that engines can use the device. Calls fail until `wake`.

        Reference policy and teacher are there between their uses, except at ZeRO 3, where parts stay on the device.
        """
        for model in filter(None, (self.policy, self.critic)):
            model.offload()
        self.asleep = True

    def wake(self) -> None:
        """Move all states back to the device."""
        self.asleep = False
        for model in filter(None, (self.policy, self.critic)):
            model.reload()

    @property
    def _policy(self) -> TrainedModel:
        if self.policy is None:
            raise RuntimeError("start_stage comes first")
        if self.asleep:
            raise RuntimeError("the learner sleeps: engines use its device")
        return self.policy

    def save(self, folder: Path) -> None:
        """Write the files of policy and critic below `folder`. Collective.

        Raises:
            CheckpointError: on all ranks, if one cannot write. Training can go on as if nothing had been saved.
        """
        parts = CheckpointDirectory(folder)
        save_model(self._policy, parts.policy, parts.learner)
        if self.critic is not None:
            save_model(self.critic, parts.critic, parts.critic_learner)

    def send(self, sender: WeightSender, version: int, members: Sequence[str]) -> WeightManifest | None:
        """Pass the weights of the whole policy to the sender of rank 0. Collective.

        Args:
            members: as in `rlsys.interfaces.Learner.send`.

        Returns:
            The contents of the version; None on other ranks.

        Raises:
            LearnerLostError: on all ranks, if the sender failed.
        """
        tensors = published_tensors(self._policy.module, self._policy.gather)
        manifest = None
        with fail_on_all_ranks(LearnerLostError, self.settings.device):
            try:
                if self.settings.rank == 0:
                    attempt = self.settings.attempt
                    manifest = sender.send(tensors, version=version, attempt=attempt, members=members)
            finally:
                for _ in tensors:  # every rank must take part in gathering, even if only rank 0 sends
                    pass
        return manifest

    @torch.no_grad()
    def score(self, rows: Sequence[Int32Array]) -> list[Float32Array]:
        """Return log p(token t+1 | tokens 0..t) of every row, `[T-1]` each, at temperature 1. Collective."""
        return [self.forward.score(self._policy, row).cpu().numpy() for row in rows]

    def score_pairs(self, pairs: Sequence[Preference]) -> list[tuple[float, float]]:
        """Return the scores of the chosen and the rejected side under the current policy, sums in nats. Collective."""
        return self.scorer.policy_pair_scores(pairs)

    @property
    def scorer(self) -> RankScorer:
        """Scores under the current models."""
        return RankScorer(self.settings, self.forward, self._policy, self.reference, self.critic)

    # --- training ---

    def train(self, batch: TrainingBatch, step: int, version: int) -> dict[str, float]:
        """Run one training step of the joint objective. Collective.

        Before a step of several updates or two models, snapshots of the models are taken for a rollback. One update of
        one model needs no snapshot.

        Args:
            batch: data of the step.
            step: number of the step in its stage, from 0; sets the weights of the terms.
            version: weight version that the step makes; it seeds the random choices of the step.

        Returns:
            Metrics by registered name.

        Raises:
            NonFiniteLossError: on all ranks, if a score, loss, gradient or gradient norm of any update is not finite
                on one. Weights, moments and counters are then bit for bit as before the call, and the next call
                behaves as if this one had not happened.
        """
        fault("learner.step", version=version)
        seed, objective = self._reseed(version), self.settings.objective
        weights = term_weights(objective, self.stage, step)
        self._token_values = []
        updates = self._updates(batch, step, weights, seed)
        training = TrainingStep(
            settings=self.settings,
            forward=self.forward,
            policy=self._policy,
            critic=self.critic,
            weights=weights,
            teacher=self.teacher or self.reference,
            interpolation=batch.interpolation or objective.distill.interpolation_at(step, self.stage.steps),
            metrics=StepMetrics(self.settings.device, tuple(weights), reports=self.settings.reports),
            tokens=TokenRecorder(batch, weights, objective.policy.overlong_shaping(self.settings.max_tokens)),
        )
        measures = bool(objective.grad_norm_interval) and step % objective.grad_norm_interval == 0
        contexts = [UpdateContext(version, number, measures and not number) for number in range(len(updates))]
        with rollback_on_non_finite(training.models, len(updates)):
            updates_made = sum(map(training.update, updates, contexts))
        self._token_values = training.tokens.values()  # not the recorder, which holds the batch
        metrics = training.metrics
        for term, weight in weights.items():
            metrics.note(f"objective/{term}_weight", weight)
        preference = objective.preference
        if "preference" in weights and preference.source == "search" and preference.pairs == "steps":
            metrics.note("preference/left_out", float(count_dropped_step_pairs(batch.groups)))
        return metrics.reduce(updates_made)

    def token_values(self) -> list[TokenValues | None]:
        """Return the values of `TrainingBatch.kept` in the last step; None where another rank has them."""
        return self._token_values

    def _updates(self, batch: TrainingBatch, step: int, weights: dict[str, float], seed: int) -> list[list[PackItem]]:
        """Return the items of each update of a training step."""
        objective, kl = self.settings.objective, self.settings.objective.kl
        kl_weight = kl.weight_at(step, self.stage.steps) if kl.in_reward else weights.get("kl", 0.0)
        by_source = build_samples(
            batch,
            objective,
            StepTerms(weights=weights, chosen_sft=self.stage.sft_on_chosen(objective), kl_weight=kl_weight),
            max_tokens=self.settings.max_tokens,
            scorer=self.scorer,
            thoughts=ThoughtMask(share=objective.sft.mask_share, token=self.settings.pad_token_id, seed=seed),
        )
        split = [split_updates(entries, self.stage.updates_per_step, seed=seed) for entries in by_source]
        updates = [
            [item for entries in update for items in entries for item in items] for update in zip(*split, strict=True)
        ]
        if "policy" in weights and objective.policy.decoupled:
            # In the first update, the current policy is the old policy. Later updates need its log-probabilities.
            updates[1:] = [self._with_old_logprobs(items, weights) for items in updates[1:]]
        return updates

    def _with_old_logprobs(self, items: list[PackItem], weights: dict[str, float]) -> list[PackItem]:
        """Return items in which every sample with a gradient of the policy term has old log-probabilities.

        Missing values come from the current policy.
        """

        def lacks(sample: Sample) -> bool:
            trained = policy_changes_weights(sample, weights, self.settings.objective)
            return trained and lacks_old_logprobs(sample)

        old = iter(self.scorer.old_logprobs([sample for item in items for sample in item.samples if lacks(sample)]))
        return [
            replace(
                item,
                samples=tuple(
                    with_old_logprobs(sample, next(old)) if lacks(sample) else sample for sample in item.samples
                ),
            )
            for item in items
        ]

    def _reseed(self, version: int) -> int:
        """Seed torch from run seed, version and rank; return the seed of the step's shuffles.

        Every random choice of a step depends only on seed, version and rank, so a checkpoint needs no generator state.
        """
        torch.manual_seed(_seed(self.settings.seed, version, self.settings.rank))
        return _seed(self.settings.seed, version)


def _loaded(settings: RankSettings, load: Callable[..., Module], folder: Path) -> Module:
    """Load a model. Raise on all ranks if one cannot read it, because the next calls need all ranks.

    Raises:
        LearnerLostError: a rank failed; new ranks may succeed.
        ConfigError: a rank refused the folder, as new ranks would.
    """
    module, refusal, learner = None, "", settings.learner
    with fail_on_all_ranks(LearnerLostError, settings.device):
        try:
            module = load(folder, learner.dtype, settings.device, partitioned=learner.zero_stage == 3)
        except ConfigError as error:
            refusal = error.message
    with fail_on_all_ranks(ConfigError, settings.device):
        if module is None:
            raise ConfigError(refusal)
    return module


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
