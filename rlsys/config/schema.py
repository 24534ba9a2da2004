"""The schema of a config. The docstring under a field is its help in `rlsys keys`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from rlsys.config.checks import RULES
from rlsys.config.environment import EnvironmentConfig
from rlsys.config.objective import ObjectiveConfig
from rlsys.config.rewards import RewardsConfig
from rlsys.config.search import ExtractConfig, SearchConfig
from rlsys.config.section import LayerName, PathName, Section, Temperature
from rlsys.config.served_model import TeacherConfig
from rlsys.config.tasks import TaskConfig
from rlsys.types import StageName


def _distinct(names: tuple[str, ...], noun: str) -> tuple[str, ...]:
    """Return the names, or raise if one occurs twice."""
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"expected each {noun} once, found {name} {names.count(name)} times")
    return names


class RunConfig(Section):
    dir: PathName
    """Run directory. The run writes all its files there."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of all random numbers: data order, initial weights and sampling."""
    resume: str = "auto"
    """`auto`: continue from the newest checkpoint; `never`: refuse a directory that holds a run; a path: begin with
    that checkpoint."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device of the engines and learner ranks."""
    kept_prompts: int = Field(default=2, ge=0, le=64)
    """Number of prompts of an online step whose completions are kept for `rlsys show` and `rlsys view`, up to four of
    each prompt. 0: keep none."""
    address: str = "local"
    """`local` starts Ray on the loopback interface; any other value is the address of a running Ray cluster."""
    time_limit: float | None = Field(default=None, gt=0)
    """Seconds after which a command finishes its current work, saves and exits with code 75. Run the same command again
    to continue. Leave time for one training step and one checkpoint before the limit of the job scheduler."""
    trackers: tuple[Literal["wandb", "mlflow", "trackio"], ...] = ()
    """Experiment trackers that get the metrics too, beside TensorBoard. Their packages must be installed; their own
    environment variables choose project, server and offline mode."""

    @field_validator("trackers")
    @classmethod
    def _trackers_are_distinct(cls, trackers: tuple[str, ...]) -> tuple[str, ...]:
        return _distinct(trackers, "tracker")


class FromScratchConfig(Section):
    hidden_size: int = Field(default=128, ge=16)
    """Size of the hidden states."""
    layers: int = Field(default=3, ge=1)
    """Number of transformer layers."""
    heads: int = Field(default=4, ge=1)
    """Number of attention heads, and of key-value heads."""
    intermediate_size: int = Field(default=384, ge=16)
    """Size of the feed-forward layers."""
    tie_embeddings: bool = True
    """Share the input embedding with the output layer."""
    max_positions: int = Field(default=512, ge=32)
    """Longest sequence of the model, in tokens."""

    @model_validator(mode="after")
    def _heads_divide(self) -> FromScratchConfig:
        if self.hidden_size % (32 * self.heads):
            # vLLM's attention kernels support few head sizes; the smallest is 32.
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of 32 * heads ({32 * self.heads})")
        return self


class LoraConfig(Section):
    rank: int = Field(default=16, ge=1, le=512)
    """Rank of the two factors of every adapted layer. 512 is the most that vLLM serves."""
    alpha: float = Field(default=32.0, gt=0)
    """The product of the factors is multiplied by alpha / rank."""
    target_modules: Annotated[tuple[LayerName, ...], Field(min_length=1)] | Literal["all-linear"] = "all-linear"
    """Names of the adapted linear layers, such as [q_proj, v_proj]; `all-linear`: all but the output layer."""
    merge: bool = False
    """Export the policy of the last stage as a whole model; false: as an adapter folder in the format of peft."""


class ModelConfig(Section):
    path: PathName | None = None
    """Folder or hub id of a Hugging Face causal language model with a tokenizer."""
    from_scratch: FromScratchConfig | None = None
    """Sizes of a small, randomly initialised Qwen2 with a character-level tokenizer for the task."""
    lora: LoraConfig | None = None
    """Train low-rank adapters (LoRA) of linear layers, and keep all other weights. null: train all weights."""

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if (self.path is None) == (self.from_scratch is None):
            raise ValueError("give exactly one of model.path and model.from_scratch")
        return self


class ActorsConfig(Section):
    count: int = Field(default=2, ge=1)
    """Number of rollout actors. Each has one engine."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs of one engine. A value above 1 needs run.device cuda."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of one engine."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Number format of the engine's weights and cache."""
    max_model_len: int = Field(default=256, ge=16)
    """Maximum length of a prompt plus its completion, in tokens."""
    max_num_seqs: int = Field(default=256, ge=1)
    """Maximum number of sequences that an engine decodes at the same time."""
    block_size: int = Field(default=32, ge=8)
    """Tokens in one block of the prefix cache."""
    kv_cache_gib: float = Field(default=1.0, gt=0)
    """Size of the key-value cache of one engine, in GiB."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of a GPU's memory that must be free when an engine starts. Lower it where other processes use the GPU."""
    enforce_eager: bool = True
    """true: run without compilation. false: vLLM compiles and captures CUDA graphs, which makes the start slower."""
    start_timeout_s: float = Field(default=300.0, gt=0)
    """Seconds until an actor that has not started counts as lost. At the start of a run, that loss ends the run."""
    rollout_timeout_s: float = Field(default=1800.0, gt=0)
    """Seconds until an actor that has not answered a request counts as lost."""
    hang_timeout_s: float = Field(default=120.0, gt=0)
    """Seconds without progress until an actor that has work counts as lost."""
    max_restarts: int = Field(default=16, ge=0)
    """Number of lost actors that are replaced within an hour; one more ends the run. 0: the first loss ends it."""


class SamplingConfig(Section):
    temperature: Temperature = 1.0
    """Sampling temperature of training rollouts."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus (top-p) mass of training rollouts. Below 1, the learner's log-probabilities differ from the actors'."""
    max_tokens: int = Field(default=160, ge=1)
    """Maximum length of a completion, in tokens."""


class LearnerConfig(Section):
    ranks: int = Field(default=2, ge=1)
    """Number of learner ranks (DeepSpeed processes)."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage. 0 shards nothing."""
    sequence_parallel: int = Field(default=1, ge=1)
    """Number of neighbouring ranks that share every row, each with a part of its tokens (DeepSpeed Ulysses). It divides
    `ranks` and the attention heads. 1: every rank has whole rows."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Number format of parameters and gradients. Master weights are always fp32."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of one rank."""
    micro_batch_tokens: int = Field(default=8192, ge=16)
    """Maximum number of tokens in one forward pass of one rank, padding included."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, which saves memory."""
    optimizer_offload: bool = False
    """Keep the optimizer state in host memory. Needs ZeRO stage 1, 2 or 3."""
    start_timeout_s: float = Field(default=300.0, gt=0)
    """Seconds until a rank whose process has not started makes the learner count as lost."""
    timeout_s: float = Field(default=1800.0, gt=0)
    """Seconds until a rank that has not answered a call makes the learner count as lost."""
    hang_timeout_s: float = Field(default=300.0, gt=0)
    """Seconds without progress in a training step until a rank makes the learner count as lost."""
    max_restarts: int = Field(default=4, ge=0)
    """Number of times that a lost learner is restarted from the last checkpoint without a new checkpoint in between.
    One more loss ends the run."""
    max_skipped_steps: int = Field(default=3, ge=0)
    """Number of consecutive training steps that may be skipped because a loss or gradient is not finite. One more
    restarts the learner from the last checkpoint; the second time this happens, the run ends."""


class OptimizerConfig(Section):
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate of AdamW."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay rate of AdamW's first moment."""
    beta2: float = Field(default=0.99, ge=0, lt=1)
    """Decay rate of AdamW's second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Constant added to the square root of the second moment."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    warmup_updates: int = Field(default=5, ge=0)
    """Number of optimizer updates in which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up. `linear` and `cosine` fall to `final_fraction` of the peak at the last
    update."""
    final_fraction: float = Field(default=0.0, ge=0, le=1)
    """Last learning rate divided by the peak, for the schedules linear and cosine."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Maximum global gradient norm. Larger gradients are scaled down to it."""


class WarmStartConfig(Section):
    max_steps: int = Field(default=300, ge=1)
    """Training steps of the stage warm_start."""
    rows_per_step: int = Field(default=64, ge=1)
    """Demonstrations in one training step."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-3, warmup_updates=20, schedule="cosine")
    """Optimizer of the stage warm_start."""


class SftStageConfig(Section):
    path: PathName | None = None
    """Supervised rows: the table `supervised` of `rlsys extract`, or rows of prompt and completion, messages or text
    (docs/data.md). By default, the rows that an earlier stage search has extracted."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    subset: str | None = None
    """Configuration name of a Hugging Face dataset that has several."""
    max_bad_rows: float = Field(default=0.01, ge=0, le=1)
    """Largest share of rows that are too long or unreadable. They are left out; a larger share is an error."""
    max_steps: int = Field(default=100, ge=1)
    """Training steps of the stage sft. The rows are shuffled in every epoch."""
    rows_per_step: int = Field(default=64, ge=1)
    """Rows in one training step."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-4, warmup_updates=5, schedule="cosine")
    """Optimizer of the stage sft."""


class PreferenceStageConfig(Section):
    path: PathName | None = None
    """Preference pairs: the tables `preferences` and `step_preferences` of `rlsys extract`, or rows of chosen and
    rejected with or without a prompt (docs/data.md). By default, the pairs that an earlier stage search has
    extracted."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    subset: str | None = None
    """Configuration name of a Hugging Face dataset that has several."""
    max_bad_rows: float = Field(default=0.01, ge=0, le=1)
    """Largest share of pairs that are too long or unreadable. They are left out; a larger share is an error."""
    max_steps: int = Field(default=100, ge=1)
    """Training steps of the stage preference. The pairs are shuffled in every epoch."""
    pairs_per_step: int = Field(default=32, ge=1)
    """Pairs in one training step of the stage preference, and of the stage online if objective.preference.source is
    file."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-5, warmup_updates=5, schedule="cosine")
    """Optimizer of the stage preference."""


class TrainConfig(Section):
    max_steps: int = Field(default=80, ge=1)
    """Training steps of the stage online."""
    groups_per_step: int = Field(default=64, ge=1)
    """Prompts in one training step."""
    group_size: int = Field(default=8, ge=2)
    """Completions of each prompt."""
    updates_per_step: int = Field(default=4, ge=1)
    """Optimizer updates in one training step. Each uses an equal part of the step's rows."""
    dynamic_sampling_rounds: int = Field(default=0, ge=0)
    """Maximum number of rounds in which groups without a learning signal, such as groups of equal rewards, are replaced
    by groups of the next prompts (DAPO). 0: never replace."""
    max_staleness: int = Field(default=0, ge=0)
    """Maximum number of training steps between sampling and training. 0 is synchronous training."""
    max_failed_rollouts: float = Field(default=0.1, ge=0, le=1)
    """Largest share of the run's rollouts so far that may fail. Failed rollouts are replaced; a larger share ends the
    run."""
    max_verifier_failures: float = Field(default=0.1, ge=0, le=1)
    """Largest share of the verifications, of the run so far or of one evaluation, that may raise or time out."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer of the stage online."""
    critic_optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-4)
    """Optimizer of the critic (objective.value)."""

    @model_validator(mode="after")
    def _updates(self) -> TrainConfig:
        if self.updates_per_step > self.groups_per_step:
            raise ValueError("updates_per_step must not exceed groups_per_step")
        return self


class WeightSyncConfig(Section):
    transport: Literal["object_store", "collective"] = "object_store"
    """Way of the weights from the learner to the actors. `object_store`: Ray's object store; `collective`: broadcast to
    all engines over gloo or NCCL. Actors that start late always use the object store."""
    bucket_mib: float = Field(default=64.0, gt=0)
    """Size of one bucket of tensors, in MiB. A few buckets are on their way at the same time."""
    timeout_s: float = Field(default=120.0, gt=0)
    """Seconds until an actor that has not acknowledged a publish counts as lost."""
    probe_rows: int = Field(default=4, ge=1)
    """Number of fixed sequences whose log-probabilities the actors and the learner compare after every publish. In bf16
    there are more, until they have 256 tokens."""
    probe_tolerance: float | None = Field(default=None, gt=0)
    """Largest allowed difference of these log-probabilities, in nats. By default the bounds follow from the difference
    measured with freshly loaded weights: of the largest difference in fp32, of mean and 95% quantile in bf16."""


class CheckpointConfig(Section):
    interval: int = Field(default=20, ge=1)
    """Training steps between checkpoints. The end of a stage and an interruption always write a checkpoint."""
    keep_last: int = Field(default=2, ge=1)
    """Number of newest checkpoints to keep. A checkpoint is also kept while the file `checkpoints/NAME.pinned`
    exists."""
    keep_every: int = Field(default=0, ge=0)
    """Also keep the checkpoints whose weight version is a multiple of this number. 0: keep no such checkpoints."""
    best_metric: str | None = "held_out/sampled_accuracy"
    """Metric whose best checkpoint is kept too, among checkpoints whose step measured it. null: keep none."""
    best_mode: Literal["max", "min"] = "max"
    """`max`: the largest value of best_metric is the best; `min`: the smallest."""
    max_failed_saves: int = Field(default=2, ge=0)
    """Number of consecutive saves that may fail, for example on a full disk, while training continues. One more ends
    the run. A failed save at the end of a stage or of an interrupted run always ends it."""


class EvaluationConfig(Section):
    prompts: int = Field(default=256, ge=1)
    """Held-out problems in one evaluation."""
    samples: int = Field(default=4, ge=0)
    """Sampled completions of each problem, at temperature 1 and top_p 1. 0: do not sample."""
    greedy: bool = True
    """Also evaluate greedy decoding."""
    search_answers: int = Field(default=0, ge=0)
    """Also decode with tree search (section search), until a tree has this many scored answers. 0: do not search. Only
    `rlsys evaluate` uses it."""
    interval: int = Field(default=0, ge=0)
    """Online training steps between evaluations. 0: evaluate only at the end of each stage."""


class Config(Section):
    run: RunConfig
    """Run directory, seed, device and time limit."""
    stages: tuple[StageName, ...] = Field(default=("warm_start", "online"), min_length=1)
    """Stages in order. Their settings are in these sections: warm_start (warm_start), search (search, extract), sft
    (sft), preference (preference, objective), online (train, objective, search)."""
    model: ModelConfig
    """The initial policy."""
    task: TaskConfig
    """Prompts, verifier and demonstrations."""
    environment: EnvironmentConfig = EnvironmentConfig()
    """Environment that answers the turns of the policy; see docs/environments.md."""
    placement: Literal["spread", "colocated"] = "spread"
    """`spread`: every actor and learner rank has devices of its own. `colocated`: actor n and learner rank n share one
    device in turns; the states of the other side are in host memory meanwhile."""
    actors: ActorsConfig = ActorsConfig()
    """Rollout actors."""
    sampling: SamplingConfig = SamplingConfig()
    """Sampling of training rollouts."""
    rewards: RewardsConfig = RewardsConfig()
    """Verifier processes."""
    learner: LearnerConfig = LearnerConfig()
    """Learner ranks."""
    warm_start: WarmStartConfig = WarmStartConfig()
    """The stage warm_start."""
    sft: SftStageConfig = SftStageConfig()
    """The stage sft."""
    preference: PreferenceStageConfig = PreferenceStageConfig()
    """The stage preference."""
    train: TrainConfig = TrainConfig()
    """The stage online."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """The joint loss of the stages preference and online."""
    teacher: TeacherConfig = TeacherConfig()
    """Teacher of the term objective.distill."""
    weight_sync: WeightSyncConfig = WeightSyncConfig()
    """Transfer of weights from the learner to the actors."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When checkpoints are written and which are kept."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Evaluation on held-out problems."""
    search: SearchConfig = SearchConfig()
    """Tree search in `rlsys search`, the stage search, the stage online and evaluation."""
    extract: ExtractConfig = ExtractConfig()
    """Data that `rlsys extract`, the stage search and the stage online extract from trees."""

    @field_validator("stages")
    @classmethod
    def _stages_are_distinct(cls, stages: tuple[str, ...]) -> tuple[str, ...]:
        return _distinct(stages, "stage")

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        for check in RULES:
            check(self)
        return self
