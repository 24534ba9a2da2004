"""One DeepSpeed rank: build, forward, backward, step, export, save. The only file that imports deepspeed.

A stage always starts from files: the policy as a Hugging Face folder and, where a stage is resumed, the
moments by parameter name. So building, resuming and changing ranks or ZeRO stage are the same path.
"""

from __future__ import annotations

import datetime
import gc
import inspect
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from learners import weight_source
from learners.batching import (
    MicroBatch,
    Row,
    collate,
    plan_micro_batches,
    rows_from_demonstrations,
    rows_from_groups,
    split_updates,
)
from learners.logprobs import masked_token_logprobs
from learners.losses import kl_loss, policy_loss, supervised_loss
from learners.objective import token_weights
from learners.policy_model import load_model, saved_config
from learners.rank_settings import RankSettings, deepspeed_config
from learners.schedule import learning_rate
from learners.step_sums import Pass, StepSums
from learners.tensor_files import read_tensors, write_tensors
from rlsys.config import OptimizerConfig
from rlsys.errors import CheckpointError, NonFiniteLossError
from rlsys.types import Demonstration, Float32Array, Int32Array, TrajectoryGroup

MOMENTS = ("exp_avg", "exp_avg_sq")


class PolicyEngine:
    """The policy on one rank, under DeepSpeed."""

    def __init__(self, settings: RankSettings) -> None:
        self.settings = settings
        self.updates = 0
        self.module: PreTrainedModel = None
        self.engine: Any = None
        self.reference: PreTrainedModel = None
        self._not_finite = ""
        _join_process_group(settings)

    # --- stages and files ---

    def start_stage(
        self,
        policy: Path,
        optimizer: OptimizerConfig,
        total_updates: int,
        resume: Path | None,
        reference: Path | None,
    ) -> None:
        """(Re)build the engine from `policy`; with `resume`, also its master weights, moments and counters."""
        self._release()
        self.optimizer_config, self.total_updates = optimizer, total_updates
        self.module, self.engine = _build(policy, self.settings, optimizer)
        self.config = saved_config(policy, self.settings.learner.dtype)
        if reference:
            self.reference = load_model(reference, self.settings.learner.dtype, self.settings.device).eval()
        self.updates = self._restore(resume) if resume else 0
        self._set_step_counters()

    def _release(self) -> None:
        """Free what an earlier stage built before the next is, or memory would have to hold both."""
        if self.engine is None:
            return
        self.engine.destroy()
        _forget_partitioned_modules()
        self.module = self.engine = self.reference = None
        gc.collect()  # module, hooks and engine refer to each other
        if self.settings.device == "cuda":
            torch.cuda.empty_cache()

    def save(self, folder: Path) -> None:
        """Write policy/ (a Hugging Face folder without the tokenizer) and learner/ below `folder`. Collective."""
        first = self.settings.rank == 0
        write_tensors(self._policy_tensors(), folder / "policy", "model", first)
        for key in MOMENTS:
            write_tensors(self._moments(key), folder / "learner", key, first)
        if self.settings.learner.dtype != "fp32":
            write_tensors(self._masters(), folder / "learner", "master", first)
        if first:
            self.config.save_pretrained(folder / "policy")
            (folder / "learner" / "learner.json").write_text(json.dumps({"updates": self.updates}))
        dist.barrier()

    def export(self, bucket_bytes: int) -> Iterator[tuple[Any, np.ndarray]]:
        """(bucket, bytes) of the whole policy, for the bus; ranks above 0 yield none.

        Collective: every rank must exhaust it.
        """
        tensors = weight_source.full_parameters(self.module, self._gather)
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
            logits = self.engine(input_ids=ids, use_cache=False).logits[:, :-1]
            mask = torch.ones_like(ids[:, 1:], dtype=torch.bool)
            found.append(masked_token_logprobs(logits, ids[:, 1:], mask, 1.0)[0].cpu().numpy())
        return found

    # --- training ---

    def train_online(self, groups: Sequence[TrajectoryGroup], updates: int, version: int) -> dict[str, float]:
        """One training step of the clipped policy objective, in `updates` optimizer updates."""
        seed = self._reseed(version)
        row_groups = rows_from_groups(groups, use_std=self.settings.objective.advantage_std)
        plans = [self._plan(rows, self._row_weights(rows)) for rows in split_updates(row_groups, updates, seed=seed)]
        # The first update starts from the old policy itself; only the later ones need its log-probabilities kept.
        old: list[list[Tensor | None]] = [[None] * len(plans[0])]
        old += [[self._old_logprobs(item.batch) for item in plan] for plan in plans[1:]]
        sums = StepSums(self.settings.device)
        for plan, old_logprobs in zip(plans, old, strict=True):
            for item, old_item in zip(plan, old_logprobs, strict=True):
                self._backward(self._policy_term(item, old_item, sums), "policy loss")
            self._update(sums)
        return sums.reduce(updates)

    def train_supervised(self, demonstrations: Sequence[Demonstration], version: int) -> dict[str, float]:
        """One optimizer update of the negative log-likelihood per target token."""
        self._reseed(version)
        rows = rows_from_demonstrations(demonstrations)
        weight = 1.0 / max(1, sum(row.loss_tokens for row in rows))
        sums = StepSums(self.settings.device)
        for item in self._plan(rows, np.full(len(rows), weight)):
            logprobs, _ = self._logprobs(self.engine, item.batch, temperature=1.0)
            loss = supervised_loss(logprobs, item.token_weights().to(logprobs.device)).loss
            sums.add("supervised/loss", loss)
            sums.add_supervised(item)
            self._backward(loss, "supervised loss")
        self._update(sums)
        return sums.reduce(1)

    def _policy_term(self, item: Pass, old: Tensor | None, sums: StepSums) -> Tensor:
        objective, batch = self.settings.objective, item.batch
        logprobs, entropy = self._logprobs(self.engine, batch)
        old = logprobs.detach() if old is None else old
        weights = item.token_weights().to(logprobs.device)
        advantages = batch.advantages.to(logprobs.device)
        bounds = {"clip_low": objective.clip_low, "clip_high": objective.clip_high}
        result = policy_loss(logprobs, old, advantages, weights, **bounds)
        loss = result.loss
        sums.add("learner/policy_loss", loss)
        if self.reference is not None:
            with torch.no_grad():
                reference, _ = self._logprobs(self.reference, batch)
            divergence = kl_loss(logprobs, reference, weights, estimator="k3")
            loss = loss + objective.kl_coef * divergence.loss
            sums.add("kl", divergence.metrics["kl"])
        sums.add("learner/loss", loss)
        sums.add_policy(item, result.metrics, old, entropy)
        return loss

    def _logprobs(self, model: nn.Module, batch: MicroBatch, temperature: float | None = None) -> tuple[Tensor, Tensor]:
        """[N] log-probabilities and entropies of the trained targets, at the sampling temperature by default."""
        device = self.settings.device
        ids, mask = batch.input_ids.to(device), batch.loss_mask[:, batch.first_target :].to(device)
        keep = ids.shape[1] - batch.first_target
        # Right padding needs no attention mask under causal attention: no real token looks at it.
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits[:, :-1]
        targets = ids[:, batch.first_target + 1 :]
        return masked_token_logprobs(logits, targets, mask, temperature or self.settings.temperature)

    @torch.no_grad()
    def _old_logprobs(self, batch: MicroBatch) -> Tensor:
        return self._logprobs(self.engine, batch)[0]

    def _plan(self, rows: Sequence[Row], row_weights: np.ndarray) -> list[Pass]:
        budget = self.settings.learner.micro_batch_tokens
        lengths = [row.length for row in rows]
        shares = plan_micro_batches(lengths, ranks=self.settings.ranks, budget_tokens=budget)
        return [
            Pass(
                collate([rows[i] for i in ids], self.settings.pad_token_id),
                torch.as_tensor(row_weights[ids], dtype=torch.float32),
                sum(lengths[i] for i in ids),
            )
            for ids in shares[self.settings.rank]
        ]

    def _row_weights(self, rows: Sequence[Row]) -> np.ndarray:
        return token_weights(
            [row.loss_tokens for row in rows],
            aggregation=self.settings.objective.loss_aggregation,
            max_tokens=self.settings.max_tokens,
        )

    def _reseed(self, version: int) -> int:
        """Make whatever is random in a step (shuffles) a function of seed and version: nothing to save."""
        torch.manual_seed(_seed(self.settings.seed, version, self.settings.rank))
        return _seed(self.settings.seed, version)

    def _backward(self, loss: Tensor, name: str) -> None:
        if not math.isfinite(loss.item()):
            self._not_finite = f"{name} is {loss.item()} on rank {self.settings.rank}"
        # DeepSpeed averages gradients over ranks; our denominators are global already.
        self.engine.backward(loss * self.settings.ranks)

    def _check_finite(self) -> None:
        """All ranks agree before the optimizer sees anything; one wait an update, not one a pass."""
        bad = torch.tensor(float(bool(self._not_finite)), device=self.settings.device)
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        if bad.item():
            found = self._not_finite or "the loss of another rank is not finite"
            raise NonFiniteLossError(f"{found}, at update {self.updates}; nothing was updated or published")

    def _update(self, sums: StepSums) -> None:
        self._check_finite()
        rate = learning_rate(self.optimizer_config, self.updates, self.total_updates)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm())
        if not math.isfinite(norm):
            raise NonFiniteLossError(f"gradient norm is {norm} at update {self.updates}; nothing was published")
        self.updates += 1
        sums.note("learner/grad_norm", norm)
        sums.note("learner/learning_rate", rate)

    # --- full tensors, whatever the ZeRO stage ---

    def _gather(self, parameter: nn.Parameter) -> Tensor:
        if not hasattr(parameter, "ds_id"):
            return parameter.detach()
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def _policy_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.module.named_parameters():
            yield name, self._gather(parameter)

    def _masters(self) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in self.module.named_parameters():
            yield name, safe_get_full_fp32_param(parameter)

    def _moments(self, key: str) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        plain = self._plain_states()
        for name, parameter in self.module.named_parameters():
            found = plain[parameter][key] if plain is not None else safe_get_full_optimizer_state(parameter, key)
            yield name, found

    def _restore(self, folder: Path) -> int:
        parameters = dict(self.module.named_parameters())
        for key in (*MOMENTS, *(("master",) if self.settings.learner.dtype != "fp32" else ())):
            missing = set(parameters)
            for name, tensor in read_tensors(folder / "learner", key):
                if name not in missing:
                    raise CheckpointError(f"{folder}: {key} holds {name}, which the model has not")
                missing.discard(name)
                self._set_state(parameters[name], key, tensor)
            if missing:
                raise CheckpointError(f"{folder}: {key} lacks {sorted(missing)[:3]}")
        return int(json.loads((folder / "learner" / "learner.json").read_text())["updates"])

    def _set_state(self, parameter: Any, key: str, tensor: Tensor) -> None:
        """Put this rank's part of a whole moment or master weight in its place."""
        from deepspeed import utils

        plain = self._plain_states()
        if plain is not None:
            plain[parameter][key].copy_(tensor)
        elif hasattr(parameter, "ds_id"):
            # The setters of whole tensors fail under ZeRO 3 where the last rank's part is padded.
            size = parameter.ds_tensor.numel()
            own = tensor.flatten()[size * self.settings.rank :][:size]
            part = nn.functional.pad(own, (0, size - own.numel()))
            if key == "master":
                utils.safe_set_local_fp32_param(parameter, part)
            else:
                utils.safe_set_local_optimizer_state(parameter, part, key)
        elif key == "master":
            utils.safe_set_full_fp32_param(parameter, tensor)
        else:
            utils.safe_set_full_optimizer_state(parameter, tensor, key)

    def _plain_states(self) -> dict[nn.Parameter, dict[str, Tensor]] | None:
        """The optimizer's state by parameter at ZeRO 0; None where DeepSpeed holds flat partitions."""
        inner = getattr(self.engine.optimizer, "optimizer", None)
        return None if inner is not None else self.engine.optimizer.state

    def _set_step_counters(self) -> None:
        inner = getattr(self.engine.optimizer, "optimizer", self.engine.optimizer)
        for state in inner.state.values():
            state["step"] = torch.tensor(float(self.updates))


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def _join_process_group(settings: RankSettings) -> None:
    import deepspeed

    if settings.device == "cpu":
        torch.set_num_threads(settings.learner.threads)
        torch.use_deterministic_algorithms(True)
    else:
        torch.cuda.set_device(0)  # Ray shows every rank its own GPU as device 0
    backend = {"cpu": "gloo", "cuda": "nccl"}[settings.device]
    dist.init_process_group(
        backend,
        init_method=f"file://{settings.store}",
        rank=settings.rank,
        world_size=settings.ranks,
        timeout=datetime.timedelta(seconds=settings.learner.timeout_s),
    )
    # An inference-only shared-memory all-reduce, compiled at first use; training never calls it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def _build(path: Path, settings: RankSettings, optimizer: OptimizerConfig) -> tuple[PreTrainedModel, Any]:
    import deepspeed

    learner = settings.learner
    # Training mode, because gradient checkpointing is off without; it adds no noise (see load_model).
    module = load_model(path, learner.dtype, settings.device).train()
    if learner.gradient_checkpointing:
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    parameters = sum(parameter.numel() for parameter in module.parameters())
    adam = torch.optim.AdamW(
        module.parameters(),
        lr=optimizer.learning_rate,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
    )
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=adam, config=deepspeed_config(learner, optimizer, parameters)
    )
    if learner.zero_stage == 0 and learner.dtype == "fp32":
        # DeepSpeed clips here too, but forgets the norm it found.
        def clip() -> None:
            engine._global_grad_norm = nn.utils.clip_grad_norm_(module.parameters(), optimizer.max_grad_norm)

        engine.clip_fp32_gradients = clip
    _create_states(engine)
    return module, engine


def _forget_partitioned_modules() -> None:
    """Clear the two globals in which DeepSpeed 0.19.8 keeps a destroyed ZeRO 3 engine: a list and a method's cache."""
    from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator

    parameter_offload.FWD_MODULE_STACK.clear()
    coordinator: Any = partitioned_param_coordinator.PartitionedParameterCoordinator
    method = coordinator._PartitionedParameterCoordinator__params_to_release
    inspect.getclosurevars(method).nonlocals["func"].cache_clear()


def _create_states(engine: Any) -> None:
    """Give every optimizer tensor its zero moments now, so that they can be restored before the first update."""
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    # ZeRO 3 hands its partitions to the inner optimizer only while it steps.
    flat = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)
    for parameter in flat or [parameter for group in inner.param_groups for parameter in group["params"]]:
        inner.state[parameter] = {
            "step": torch.tensor(0.0),
            **{key: torch.zeros_like(parameter) for key in MOMENTS},
        }
    link = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:
        link()
