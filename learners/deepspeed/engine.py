"""One model under DeepSpeed on one rank: build, forward, backward, update, and whole tensors at any ZeRO stage.

Only this module imports deepspeed. A model always starts from files: its weights come from a Hugging Face folder and,
after a resume, its moments come by parameter name. So a start, a resume, and a change of ranks or ZeRO stage use the
same code.
"""

from __future__ import annotations

import datetime
import gc
import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from learners.deepspeed.collective_errors import first_problem
from learners.deepspeed.parameters import adapter_tensors, has_adapter, trained_parameters
from learners.deepspeed.partition import is_partitioned, own_part, whole_shape
from learners.deepspeed.rollback import UpdateSnapshot, discard_gradients
from learners.deepspeed.sequence_parallel import sequence_group
from learners.language_model import LanguageModel
from learners.objective.schedule import learning_rate
from learners.settings import RankSettings, deepspeed_config
from rlsys.config.schema import OptimizerConfig
from rlsys.errors import NonFiniteLossError
from rlsys.fault_injection import fault
from rlsys.models.adapters import AdapterSpec
from rlsys.models.tensors import persistent_buffers

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "master"
UNPUBLISHED = "nothing of this training step was published"


class TrainedModel:
    """A model and its optimizer, distributed over the ranks.

    Args:
        name: "policy" or "critic", for error messages and fault points.
        module: language model or `Critic` without training noise, in fp32 or bf16, on the device.
        saved_config: configuration to store with the weights: that of the model, or of its adapter.
        settings: settings of the rank.
        optimizer: hyperparameters of the optimizer.
        total_updates: optimizer updates of the stage, for the schedule of the learning rate.
    """

    def __init__(
        self,
        name: str,
        module: Any,
        saved_config: PreTrainedConfig | AdapterSpec,
        settings: RankSettings,
        optimizer: OptimizerConfig,
        total_updates: int,
    ) -> None:
        self.name, self.settings = name, settings
        self._optimizer_config, self._total_updates = optimizer, total_updates
        self.saved_config = saved_config
        self.module, self.updates, self.adapted = module, 0, has_adapter(module)
        self._problem, self._spoil_next = "", False
        self._gradient_sum = torch.zeros((), device=settings.device)
        for _, parameter in trained_parameters(module):
            parameter.register_hook(self._add_to_gradient_sum)
        sequence = sequence_group(settings.learner.sequence_parallel)
        self.bare: Any = LanguageModel(module, sequence) if isinstance(module, PreTrainedModel) else module
        if sequence is not None and self.bare is module:
            self.bare.share(sequence)
        self.engine = _build(self.bare, settings, optimizer)
        if settings.learner.zero_stage == 0 and settings.learner.dtype == "fp32":
            self.engine.clip_fp32_gradients = self._clip
        self._snapshot, self._snapshot_updates = UpdateSnapshot(self.engine), 0

    def __call__(self, **inputs: Any) -> Any:
        return self.engine(**inputs)

    def backward(self, loss: Tensor, loss_name: str, tags: Mapping[str, int]) -> None:
        """Add the gradient of a loss to this rank's part of the update.

        Args:
            loss: scalar, with global denominators.
            loss_name: name of the loss, for the error message.
            tags: version and update, for the fault points.
        """
        fault("learner.backward", **tags, model=self.name)
        if fault("learner.loss", **tags, model=self.name) == "nan":
            loss = loss * math.nan
        self._spoil_next = fault("learner.gradient", **tags, model=self.name) == "nan"
        if not math.isfinite(loss.item()):
            self._problem = f"{loss_name} is {loss.item()} on rank {self.settings.rank}"
        # DeepSpeed averages gradients over the ranks, but our denominators are global already. Ranks that share rows
        # have the same loss, of which each has the gradient of its own tokens.
        self.engine.backward(loss * self.settings.ranks)

    def _add_to_gradient_sum(self, gradient: Tensor) -> Tensor:
        """Add a gradient to one running sum, which stays finite only if every element is finite."""
        if self._spoil_next:  # set by a fault point
            self._spoil_next, gradient = False, gradient.clone()
            gradient[(0,) * gradient.dim()] = math.nan
        self._gradient_sum += gradient.sum(dtype=torch.float32)
        return gradient

    def check_finite(self) -> None:
        """Check losses and gradients since the last update, before an optimizer sees them. Collective.

        This takes one exchange per update, not one per pass.

        Raises:
            NonFiniteLossError: on all ranks, if a loss or gradient of a pass is not finite on one.
        """
        problem = self._problem
        if not problem and not math.isfinite(self._gradient_sum.item()):
            problem = f"gradient of the {self.name} is not finite on rank {self.settings.rank}"
        self._reset_checks()
        if shared_problem := first_problem(problem, self.settings.device):
            raise NonFiniteLossError(f"{shared_problem}, at update {self.updates}, which was not made; {UNPUBLISHED}")

    def _reset_checks(self) -> None:
        self._problem, self._spoil_next = "", False
        self._gradient_sum.zero_()

    def update(self) -> tuple[float, float]:
        """Take an optimizer step. Call `check_finite` of every model of the update first.

        Returns:
            The global gradient norm before clipping, and the learning rate.

        Raises:
            NonFiniteLossError: on all ranks, if the gradients are finite but their norm is not. This model is then not
                updated. Models that the same step updated before need `roll_back`.
        """
        rate = learning_rate(self._optimizer_config, self.updates, self._total_updates)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        # If the norm is not finite, no rank updates: DeepSpeed skips the step, and at ZeRO 0 our clipping raises.
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm())
        self._check_norm(norm)
        self.updates += 1
        return norm, rate

    def _clip(self) -> None:
        """Clip gradients as DeepSpeed does, store their norm, and raise if the norm is not finite."""
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self._optimizer_config.max_grad_norm)
        self.engine._global_grad_norm = norm
        self._check_norm(float(norm))

    def _check_norm(self, norm: float) -> None:
        if not math.isfinite(norm):
            raise NonFiniteLossError(
                f"gradient norm of the {self.name} is {norm} at update {self.updates}; {UNPUBLISHED}"
            )

    def last_layer(self) -> list[nn.Parameter]:
        """Return the trained parameters of the last transformer layer; none under ZeRO 3, which partitions them."""
        layers = [child for child in self.module.modules() if isinstance(child, nn.ModuleList) and len(child)]
        if self.settings.learner.zero_stage == 3 or not layers:
            return []
        return [parameter for _, parameter in trained_parameters(max(layers, key=len)[-1])]

    # --- rollback ---

    def take_snapshot(self) -> None:
        """Copy the state that updates change on this rank; see `UpdateSnapshot` for the memory."""
        self._snapshot_updates = self.updates
        self._snapshot.take()

    def roll_back(self) -> None:
        """Restore the snapshot, bit for bit. Collective."""
        self.updates = self._snapshot_updates
        self._snapshot.restore()

    def discard_gradients(self) -> None:
        """Discard the gradients since the last update."""
        self._reset_checks()
        discard_gradients(self.engine)

    def set_updates(self, updates: int) -> None:
        """Set the number of finished updates, which the optimizer's bias correction also uses."""
        self.updates = updates
        inner = getattr(self.engine.optimizer, "optimizer", self.engine.optimizer)
        for entry in inner.state.values():
            entry["step"].fill_(updates)

    def offload(self) -> None:
        """Move weights, gradients and optimizer states to the host. On CPUs they are there already."""
        if self.settings.device == "cuda":
            self.engine.offload_states()
            torch.cuda.empty_cache()

    def reload(self) -> None:
        """Move the states back to the device."""
        if self.settings.device == "cuda":
            self.engine.reload_states()

    def destroy(self) -> None:
        """Free the memory of model and optimizer, before another model is built."""
        self.engine.destroy()
        forget_partitioned_modules()
        self.module = self.bare = self.engine = None
        del self._snapshot
        gc.collect()  # module, hooks and engine refer to each other
        if self.settings.device == "cuda":
            torch.cuda.empty_cache()

    # --- whole tensors at any ZeRO stage ---

    def gather(self, parameter: nn.Parameter) -> Tensor:
        """Return a whole parameter, detached. Collective under ZeRO 3."""
        if not is_partitioned(parameter):
            return parameter.detach()
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter whole, then every persistent buffer, by name; or the adapter's tensors. Collective."""
        if self.adapted:
            yield from adapter_tensors(self.module, self.gather)
            return
        for name, parameter in self.module.named_parameters():
            yield name, self.gather(parameter)
        yield from persistent_buffers(self.module)

    def named_states(self, key: str) -> Iterator[tuple[str, Tensor]]:
        """Yield a whole optimizer tensor of every parameter, by name. Collective.

        Args:
            key: one of MOMENTS, or MASTER for the fp32 master weights of a bf16 model.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        plain = self._plain_states()
        for name, parameter in trained_parameters(self.module):
            if key == MASTER:
                yield name, safe_get_full_fp32_param(parameter)
            elif plain is not None:
                yield name, plain[parameter][key]
            else:
                yield name, safe_get_full_optimizer_state(parameter, key)

    def set_state(self, parameter: Any, key: str, tensor: Tensor) -> None:
        """Set this rank's part of a whole optimizer tensor.

        Args:
            parameter: parameter of the module.
            key: one of MOMENTS, or MASTER.
            tensor: the whole tensor.
        """
        from deepspeed import utils

        plain = self._plain_states()
        if plain is not None:
            plain[parameter][key].copy_(tensor)
        elif is_partitioned(parameter):
            # Under ZeRO 3, DeepSpeed's setters of whole tensors fail if the last rank's part is padded.
            part = own_part(parameter, tensor)
            if key == MASTER:
                utils.safe_set_local_fp32_param(parameter, part)
            else:
                utils.safe_set_local_optimizer_state(parameter, part, key)
        elif key == MASTER:
            utils.safe_set_full_fp32_param(parameter, tensor)
        else:
            utils.safe_set_full_optimizer_state(parameter, tensor, key)

    def _plain_states(self) -> dict[nn.Parameter, dict[str, Tensor]] | None:
        """Return the optimizer's state by parameter at ZeRO 0, or None if DeepSpeed holds flat partitions."""
        inner = getattr(self.engine.optimizer, "optimizer", None)
        return None if inner is not None else self.engine.optimizer.state


def join_process_group(settings: RankSettings) -> None:
    """Join the process group of all ranks. Call it once per process."""
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
    # Disable an all-reduce for inference, which would be compiled at its first use. Training never calls it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def _build(module: Any, settings: RankSettings, optimizer: OptimizerConfig) -> Any:
    import deepspeed

    learner = settings.learner
    # Gradient checkpointing works only in training mode. Training mode adds no noise (see load_model).
    module.train()
    if learner.gradient_checkpointing:
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [parameter for _, parameter in trained_parameters(module)]
    parameters = sum(whole_shape(parameter).numel() for parameter in trained)
    adam = torch.optim.AdamW(
        trained,
        lr=optimizer.learning_rate,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        fused=True,
    )
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=adam, config=deepspeed_config(learner, optimizer, parameters, settings.device)
    )
    _create_states(engine)
    return engine


def partitioned_for_inference(module: nn.Module, settings: RankSettings) -> Any:
    """Return an engine that gathers the partitioned parameters of a frozen module, layer by layer."""
    import deepspeed

    config = deepspeed_config(settings.learner, OptimizerConfig(), 0, settings.device)
    zero = {"stage": 3, "overlap_comm": settings.device == "cuda"}
    engine, *_ = deepspeed.initialize(model=module, config={**config, "zero_optimization": zero})
    engine.eval()
    return engine


def forget_partitioned_modules() -> None:
    """Clear the list and the method cache in which DeepSpeed 0.19.8 keeps a destroyed ZeRO 3 engine."""
    from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator

    parameter_offload.FWD_MODULE_STACK.clear()
    coordinator: Any = partitioned_param_coordinator.PartitionedParameterCoordinator
    method = coordinator._PartitionedParameterCoordinator__params_to_release
    inspect.getclosurevars(method).nonlocals["func"].cache_clear()


def _create_states(engine: Any) -> None:
    """Create the zero moments of every optimizer tensor, so that they can be restored before the first update."""
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    # Under ZeRO 3, the inner optimizer holds the partitions only during a step.
    flat = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)
    for parameter in flat or [parameter for group in inner.param_groups for parameter in group["params"]]:
        inner.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            **{key: torch.zeros_like(parameter) for key in MOMENTS},
        }
    link = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:
        link()
