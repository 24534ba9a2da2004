"""One model under DeepSpeed on one rank: build, forward, backward, update, full tensors, save, restore.

The only file that imports deepspeed. A model always starts from files: its weights as a Hugging Face folder and, where
it is resumed, the moments by parameter name. So building, resuming and changing ranks or ZeRO stage are the same path.
"""

from __future__ import annotations

import datetime
import gc
import inspect
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from learners.deepspeed.collective_errors import first_problem, together
from learners.deepspeed.rollback import Copies, discard_gradients
from learners.deepspeed.tensor_files import read_tensors, write_tensors
from learners.objective.schedule import learning_rate
from learners.settings import RankSettings, deepspeed_config
from rlsys.config.schema import OptimizerConfig
from rlsys.errors import CheckpointError, NonFiniteLossError
from rlsys.fault_injection import fault

MOMENTS = ("exp_avg", "exp_avg_sq")
UNPUBLISHED = "nothing of this training step was published"


class TrainedModel:
    """A model and its optimizer, spread over the ranks.

    Args:
        name: in error messages.
        total_updates: optimizer updates of the stage, for the course of the learning rate.
        module: noise-free, in fp32 or bf16, on the device. saved_config: what to store beside its weights.
    """

    def __init__(
        self,
        name: str,
        module: PreTrainedModel,
        saved_config: PreTrainedConfig,
        settings: RankSettings,
        optimizer: OptimizerConfig,
        total_updates: int,
    ) -> None:
        self.name, self.settings = name, settings
        self._optimizer_config, self._total_updates = optimizer, total_updates
        self._saved_config = saved_config
        self.module, self.updates = module, 0
        self._problem, self._spoilt = "", False
        self._gradients = torch.zeros((), device=settings.device)
        for parameter in module.parameters():
            parameter.register_hook(self._see)
        self.engine = _build(module, settings, optimizer)
        if settings.learner.zero_stage == 0 and settings.learner.dtype == "fp32":
            self.engine.clip_fp32_gradients = self._clip
        self._copies, self._kept_updates = Copies(self.engine), 0

    def __call__(self, **inputs: Any) -> Any:
        return self.engine(**inputs)

    def backward(self, loss: Tensor, what: str, at: Mapping[str, int]) -> None:
        """Add the gradient of this rank's part of an update.

        Args:
            what: name of the loss, for the error. at: version and update under way, for the fault points.
        """
        fault("learner.backward", **at, model=self.name)
        if fault("learner.loss", **at, model=self.name) == "nan":
            loss = loss * math.nan
        self._spoilt = fault("learner.gradient", **at, model=self.name) == "nan"
        if not math.isfinite(loss.item()):
            self._problem = f"{what} is {loss.item()} on rank {self.settings.rank}"
        # DeepSpeed averages gradients over ranks; our denominators are global already.
        self.engine.backward(loss * self.settings.ranks)

    def _see(self, gradient: Tensor) -> Tensor:
        """Add a gradient of this rank up to one number: it is not finite where an element is not."""
        if self._spoilt:  # by a fault point
            self._spoilt, gradient = False, gradient.clone()
            gradient[(0,) * gradient.dim()] = math.nan
        self._gradients += gradient.sum(dtype=torch.float32)
        return gradient

    def check_finite(self) -> None:
        """All ranks agree before any optimizer sees anything; one wait an update, not one a pass.

        Raises:
            NonFiniteLossError: on all ranks, where a loss or gradient of a pass was not finite on one.
        """
        problem = self._problem
        if not problem and not math.isfinite(self._gradients.item()):
            problem = f"gradient of the {self.name} is not finite on rank {self.settings.rank}"
        self._forget_passes()
        if found := first_problem(problem, self.settings.device):
            raise NonFiniteLossError(f"{found}, at update {self.updates}, which was not made; {UNPUBLISHED}")

    def _forget_passes(self) -> None:
        self._problem, self._spoilt = "", False
        self._gradients.zero_()

    def update(self) -> tuple[float, float]:
        """Take an optimizer step; answers with the global gradient norm before clipping and the learning rate.

        `check_finite` comes first, of every model of the update.

        Raises:
            NonFiniteLossError: on all ranks, where the gradients of the ranks are finite and their norm is not. The
                optimizer does not see them; those of models that were updated before have seen theirs, which
                `put_back` undoes.
        """
        rate = learning_rate(self._optimizer_config, self.updates, self._total_updates)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        # Where the norm is not finite no rank updates: DeepSpeed skips the step, at ZeRO 0 our clipping raises.
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm())
        self._check_norm(norm)
        self.updates += 1
        return norm, rate

    def _clip(self) -> None:
        """As DeepSpeed, which would forget the norm it found and go on where that is not finite."""
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self._optimizer_config.max_grad_norm)
        self.engine._global_grad_norm = norm
        self._check_norm(float(norm))

    def _check_norm(self, norm: float) -> None:
        if not math.isfinite(norm):
            raise NonFiniteLossError(
                f"gradient norm of the {self.name} is {norm} at update {self.updates}; {UNPUBLISHED}"
            )

    def last_layer(self) -> list[nn.Parameter]:
        """Parameters of the last transformer layer, whole on every rank; none where ZeRO 3 has cut them."""
        layers = [found for found in self.module.modules() if isinstance(found, nn.ModuleList) and len(found)]
        if self.settings.learner.zero_stage == 3 or not layers:
            return []
        return list(max(layers, key=len)[-1].parameters())

    # --- taking updates back ---

    def keep(self) -> None:
        """Copy what updates change on this rank: see `Copies` for the memory it takes."""
        self._kept_updates = self.updates
        self._copies.take()

    def put_back(self) -> None:
        """Undo the updates since `keep`, bit for bit. Collective."""
        self.updates = self._kept_updates
        self._copies.put_back()

    def discard_gradients(self) -> None:
        """Forget the backward passes since the last update."""
        self._forget_passes()
        discard_gradients(self.engine)

    # --- files ---

    def save(self, weights: Path, state: Path) -> None:
        """Write a Hugging Face folder without the tokenizer, and what else the optimizer needs. Collective.

        Raises:
            CheckpointError: on all ranks, where one could not write.
        """
        first, problem = self.settings.rank == 0, ""
        for tensors, folder, stem in self._tensors(weights, state):
            try:
                write_tensors(tensors, folder, stem, first and not problem)
            except CheckpointError as error:  # the others still gather, which needs every rank
                problem = problem or error.message
        with together(CheckpointError, self.settings.device):
            if problem:
                raise CheckpointError(problem)
            if first:
                self._saved_config.save_pretrained(weights)
                (state / "learner.json").write_text(json.dumps({"updates": self.updates}))

    def restore(self, state: Path | None) -> None:
        """Take master weights, moments and counters from a folder that `save` wrote; None: those of the beginning.

        Raises:
            CheckpointError: on all ranks, where one could not read them.
        """
        with together(CheckpointError, self.settings.device):
            if state is not None:
                self._restore_tensors(state)
                self.updates = int(json.loads((state / "learner.json").read_text())["updates"])
        inner = getattr(self.engine.optimizer, "optimizer", self.engine.optimizer)
        for entry in inner.state.values():
            entry["step"] = torch.tensor(float(self.updates))

    def destroy(self) -> None:
        """Free it before another is built, or memory would have to hold both."""
        self.engine.destroy()
        _forget_partitioned_modules()
        self.module = self.engine = None
        del self._copies
        gc.collect()  # module, hooks and engine refer to each other
        if self.settings.device == "cuda":
            torch.cuda.empty_cache()

    def _restore_tensors(self, folder: Path) -> None:
        parameters = dict(self.module.named_parameters())
        for key in (*MOMENTS, *(("master",) if self.settings.learner.dtype != "fp32" else ())):
            missing = set(parameters)
            for name, tensor in read_tensors(folder, key):
                if name not in missing:
                    raise CheckpointError(f"{folder}: {key} holds {name}, which the model has not")
                missing.discard(name)
                self._set_state(parameters[name], key, tensor)
            if missing:
                raise CheckpointError(f"{folder}: {key} lacks {sorted(missing)[:3]}")

    # --- full tensors, whatever the ZeRO stage ---

    def gather(self, parameter: nn.Parameter) -> Tensor:
        """A parameter whole. Collective under ZeRO 3."""
        if not hasattr(parameter, "ds_id"):
            return parameter.detach()
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def _tensors(self, weights: Path, state: Path) -> Iterator[tuple[Iterator[tuple[str, Tensor]], Path, str]]:
        """What `save` writes: named tensors, the folder, and the stem of its files."""
        yield self._parameters(), weights, "model"
        for key in MOMENTS:
            yield self._moments(key), state, key
        if self.settings.learner.dtype != "fp32":
            yield self._masters(), state, "master"

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.module.named_parameters():
            yield name, self.gather(parameter)

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


def join_process_group(settings: RankSettings) -> None:
    """Meet the other ranks. Once a process."""
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


def _build(module: PreTrainedModel, settings: RankSettings, optimizer: OptimizerConfig) -> Any:
    import deepspeed

    learner = settings.learner
    # Training mode, because gradient checkpointing is off without; it adds no noise (see load_model).
    module.train()
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
    _create_states(engine)
    return engine


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
