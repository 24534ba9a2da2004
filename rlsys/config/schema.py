"""The configuration schema. The docstring under a field is its help; `rlsys.config.files` reads and writes it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlsys.config.objective import ObjectiveConfig
from rlsys.config.patterns import resolve
from rlsys.config.search import ExtractConfig, SearchConfig
from rlsys.config.section import Section
from rlsys.errors import ConfigError
from rlsys.types import StageName

# An empty path names no file; to leave one out is to say null.
PathName = Annotated[str, Field(min_length=1)]


class RunConfig(Section):
    dir: PathName
    """Run directory; everything the run writes is below it."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of everything random: data order, initial weights, sampling."""
    resume: str = "auto"
    """`auto` continues from the newest checkpoint, `never` refuses a used directory, a path begins with that one."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where engines and learner ranks compute."""
    address: str = "local"
    """`local` starts a Ray instance on loopback; anything else is the address of a running cluster."""
    time_limit: float | None = Field(default=None, gt=0)
    """Seconds after which a command finishes what is under way, saves and ends with exit code 75; the same command
    continues. Leave room for one training step and one checkpoint before the end of the job's own time."""


class FromScratchConfig(Section):
    hidden_size: int = Field(default=128, ge=16)
    """Width of the model."""
    layers: int = Field(default=3, ge=1)
    """Number of transformer layers."""
    heads: int = Field(default=4, ge=1)
    """Attention heads (and key-value heads)."""
    intermediate_size: int = Field(default=384, ge=16)
    """Width of the feed-forward layers."""
    tie_embeddings: bool = True
    """Share the input embedding with the output layer."""
    max_positions: int = Field(default=512, ge=32)
    """Longest sequence the model is declared for, in tokens."""

    @model_validator(mode="after")
    def _heads_divide(self) -> FromScratchConfig:
        if self.hidden_size % (32 * self.heads):
            # vLLM's attention kernels know few head sizes; the smallest is 32.
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of 32 * heads ({32 * self.heads})")
        return self


class ModelConfig(Section):
    path: PathName | None = None
    """Folder or hub id of a Hugging Face causal language model with its tokenizer."""
    from_scratch: FromScratchConfig | None = None
    """Build a tiny Qwen2 with a character-level tokenizer made for the task."""

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if (self.path is None) == (self.from_scratch is None):
            raise ValueError("give exactly one of model.path and model.from_scratch")
        return self


class TagShares(Section):
    """How often a demonstration holds each thought node (probabilities; thinking and answer always appear)."""

    sub_task: float = Field(default=0.3, ge=0, le=1)
    """Share with a <sub-task> node."""
    hypothesis: float = Field(default=0.1, ge=0, le=1)
    """Share with a <hypothesis> node."""
    double_check: float = Field(default=0.1, ge=0, le=1)
    """Share with a <double-check> node."""
    reflection: float = Field(default=0.1, ge=0, le=1)
    """Share with a planted error that a <reflection> node corrects."""
    reclarify: float = Field(default=0.1, ge=0, le=1)
    """Share with a <reclarify> node."""


class LetterCountConfig(Section):
    type: Literal["letter_count"] = "letter_count"
    form: Literal["simple", "words"] = "simple"
    """`simple`: one letter in a random string; `words`: two letters in a word, in the authors' seven phrasings."""
    min_length: int = Field(default=5, ge=1)
    """Shortest word, in letters."""
    max_length: int = Field(default=12, ge=1, le=32)
    """Longest word, in letters."""
    alphabet: str = Field(default="abcdefgh", pattern="^[a-z]+$")
    """Letters of the simple form."""
    chunk: int = Field(default=3, ge=1)
    """Letters worked through in one <thinking> node."""
    error_rate: float = Field(default=0.1, ge=0, lt=1)
    """Probability that one increment of a demonstration is wrong and stays wrong."""
    shares: TagShares = TagShares()
    """Shares of the thought nodes in the demonstrations."""
    questions_path: PathName | None = None
    """JSON list of {id, problem, solution} used as the held-out split instead of generated questions."""

    @model_validator(mode="after")
    def _lengths(self) -> LetterCountConfig:
        if self.max_length < self.min_length:
            raise ValueError(f"max_length {self.max_length} is below min_length {self.min_length}")
        return self


class BlocksworldConfig(Section):
    type: Literal["blocksworld"] = "blocksworld"
    min_blocks: int = Field(default=3, ge=3, le=5)
    """Fewest blocks of a generated problem."""
    max_blocks: int = Field(default=3, ge=3, le=5)
    """Most blocks of a generated problem."""
    alphabet: str = Field(default="abcdefghijkl", pattern="^[a-z]+$")
    """Names of blocks; each problem draws its own among them."""
    moves_per_node: int = Field(default=2, ge=1)
    """Moves worked through in one <thinking> node; two carry one block."""
    error_rate: float = Field(default=0.2, ge=0, le=1)
    """Share of the demonstrations that note the state after one node wrongly and plan on from there."""
    shares: TagShares = TagShares()
    """Shares of the thought nodes in the demonstrations."""
    problems_path: PathName | None = None
    """JSONL file of {instance, pddl} used as the held-out split instead of generated problems."""

    @model_validator(mode="after")
    def _blocks(self) -> BlocksworldConfig:
        if self.max_blocks < self.min_blocks:
            raise ValueError(f"max_blocks {self.max_blocks} is below min_blocks {self.min_blocks}")
        if len(set(self.alphabet)) < max(len(self.alphabet), self.max_blocks):
            raise ValueError(
                f"alphabet {self.alphabet!r}: expected at least max_blocks ({self.max_blocks}) letters, all different"
            )
        return self


class DatasetConfig(Section):
    type: Literal["dataset"] = "dataset"
    path: PathName
    """JSONL or Parquet file, or a Hugging Face dataset folder or id, for training."""
    held_out_path: PathName | None = None
    """The same for evaluation; without it every `held_out_every`-th row of `path` is held out."""
    held_out_every: int = Field(default=10, ge=2)
    """Without held_out_path: one row in this many is held out."""
    split: str = "train"
    """Split of a Hugging Face dataset for training."""
    held_out_split: str = "test"
    """Split of a Hugging Face dataset for evaluation."""
    subset: str | None = None
    """Configuration name of a Hugging Face hub dataset, for training and evaluation (GSM8K: main)."""
    question_column: str = "question"
    """Column with the question."""
    answer_column: str = "answer"
    """Column with the reference answer."""
    answer_pattern: str | None = None
    """Regular expression whose first group is the reference answer inside the column (GSM8K: `#### (.+)`)."""
    demonstration_column: str | None = None
    """Column with a worked solution, for the warm start."""
    prompt_template: str = "{question}"
    """The user message; {question} is replaced."""
    max_bad_rows: float = Field(default=0.01, ge=0, le=1)
    """Share of unreadable rows that is skipped and counted; more is an error."""

    @model_validator(mode="after")
    def _template(self) -> DatasetConfig:
        if "{question}" not in self.prompt_template:
            raise ValueError("prompt_template must contain {question}")
        return self


TaskConfig = Annotated[LetterCountConfig | BlocksworldConfig | DatasetConfig, Field(discriminator="type")]


class ActorsConfig(Section):
    count: int = Field(default=2, ge=1)
    """Rollout actors, one engine each."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs of one engine; above 1 only with run.device cuda."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of one engine."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Number format of the engine's weights and cache."""
    max_model_len: int = Field(default=256, ge=16)
    """Longest prompt plus completion, in tokens."""
    max_num_seqs: int = Field(default=256, ge=1)
    """Sequences an engine decodes at once."""
    block_size: int = Field(default=32, ge=8)
    """Tokens of one prefix-cache block."""
    kv_cache_gib: float = Field(default=1.0, gt=0)
    """Key-value cache of one engine, GiB."""
    enforce_eager: bool = True
    """False lets vLLM compile and capture graphs (GPUs); slower to start."""
    start_timeout_s: float = Field(default=300.0, gt=0)
    """An actor that is not up after this many seconds is lost; at the start of a run that ends it."""
    rollout_timeout_s: float = Field(default=1800.0, gt=0)
    """An actor that has not answered a dispatch of prompts after this many seconds is lost."""
    hang_timeout_s: float = Field(default=120.0, gt=0)
    """An actor that has work and shows no progress for this many seconds is lost."""
    max_restarts: int = Field(default=16, ge=0)
    """Lost actors that are replaced within an hour; one more ends the run. 0: the first loss ends it."""


class SamplingConfig(Section):
    temperature: float = Field(default=1.0, gt=0, le=5)
    """Sampling temperature of training rollouts."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus mass of training rollouts. Below 1 the learner's log-probabilities differ by design."""
    max_tokens: int = Field(default=160, ge=1)
    """Longest completion, in tokens."""


class RewardsConfig(Section):
    workers: int = Field(default=1, ge=1)
    """Verifier processes of one actor."""
    timeout_s: float = Field(default=10.0, gt=0)
    """Deadline of one verification; later the process is killed and the outcome is `timeout`."""
    memory_mib: int = Field(default=2048, ge=256)
    """Address-space limit of a verifier process."""


class LearnerConfig(Section):
    ranks: int = Field(default=2, ge=1)
    """DeepSpeed processes."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """ZeRO stage."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Number format of parameters and gradients; master weights are always fp32."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of one rank."""
    micro_batch_tokens: int = Field(default=8192, ge=16)
    """Padded tokens of one forward pass of one rank."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    optimizer_offload: bool = False
    """Keep optimizer state in host memory (ZeRO 1 to 3)."""
    timeout_s: float = Field(default=1800.0, gt=0)
    """The learner is lost where a rank has not answered a call after this many seconds."""
    hang_timeout_s: float = Field(default=300.0, gt=0)
    """The learner is lost where a rank shows no progress within a training step for this many seconds."""
    max_restarts: int = Field(default=4, ge=0)
    """Losses of the learner, without a new checkpoint between them, after which a command goes on from the last
    checkpoint; one more ends the run."""
    max_skipped_steps: int = Field(default=3, ge=0)
    """Training steps in a row that are skipped where a loss or gradient is not finite; at one more the learner is
    started again from the last checkpoint, and at the second time the run ends."""


class OptimizerConfig(Section):
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate of AdamW."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.99, ge=0, lt=1)
    """Decay of the second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    warmup_updates: int = Field(default=5, ge=0)
    """Updates of linear warm-up from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course after the warm-up, to `final_fraction` of the peak at the stage's last update."""
    final_fraction: float = Field(default=0.0, ge=0, le=1)
    """Last learning rate over the peak, for linear and cosine."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm."""


class WarmStartConfig(Section):
    max_steps: int = Field(default=300, ge=1)
    """Training steps of the warm start."""
    rows_per_step: int = Field(default=64, ge=1)
    """Demonstrations of one step."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-3, warmup_updates=20, schedule="cosine")
    """Optimizer of the warm start."""


class SftStageConfig(Section):
    path: PathName | None = None
    """`supervised` file of `rlsys extract` (.jsonl or .parquet), or one with the text columns prompt and completion; by
    default what the stage `search` before this one has extracted."""
    max_steps: int = Field(default=100, ge=1)
    """Training steps of the stage sft; the rows are shuffled epoch by epoch."""
    rows_per_step: int = Field(default=64, ge=1)
    """Rows of one step."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-4, warmup_updates=5, schedule="cosine")
    """Optimizer of the stage sft."""


class PreferenceStageConfig(Section):
    path: PathName | None = None
    """`preferences` file of `rlsys extract`, or one with the text columns prompt, chosen and rejected; by default what
    the stage `search` has extracted."""
    max_steps: int = Field(default=100, ge=1)
    """Training steps of the stage preference; the pairs are shuffled epoch by epoch."""
    pairs_per_step: int = Field(default=32, ge=1)
    """Pairs of one step, here and online with objective.preference.source `file`."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-5, warmup_updates=5, schedule="cosine")
    """Optimizer of the stage preference."""


class TrainConfig(Section):
    max_steps: int = Field(default=80, ge=1)
    """Training steps of the online stage."""
    groups_per_step: int = Field(default=64, ge=1)
    """Prompts of one step."""
    group_size: int = Field(default=8, ge=2)
    """Completions of one prompt."""
    updates_per_step: int = Field(default=4, ge=1)
    """Optimizer updates of one step; each takes an equal part of the step's rows."""
    dynamic_sampling_rounds: int = Field(default=0, ge=0)
    """Groups without a learning signal, such as equal rewards, are replaced by those of the next prompts, in so many
    rounds at most (DAPO); 0 for never."""
    max_staleness: int = Field(default=0, ge=0)
    """Training steps that may lie between sampling and training; 0 is synchronous."""
    max_failed_rollouts: float = Field(default=0.1, ge=0, le=1)
    """Share of failed rollouts of the run so far that is replaced and counted; more ends the run."""
    max_verifier_failures: float = Field(default=0.1, ge=0, le=1)
    """Share of verifications of the run so far, and of an evaluation, that may raise or time out; more is an error."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer of the online stage."""
    critic_optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-4)
    """Optimizer of the critic (objective.value)."""

    @model_validator(mode="after")
    def _updates(self) -> TrainConfig:
        if self.updates_per_step > self.groups_per_step:
            raise ValueError("updates_per_step must not exceed groups_per_step")
        return self


class WeightSyncConfig(Section):
    bucket_mib: float = Field(default=64.0, gt=0)
    """Size of one bucket of tensors."""
    timeout_s: float = Field(default=120.0, gt=0)
    """An actor that has not acknowledged a publish after this many seconds is lost."""
    probe_rows: int = Field(default=4, ge=1)
    """Fixed sequences whose log-probabilities actor and learner must agree on after every publish."""
    probe_tolerance: float | None = Field(default=None, gt=0)
    """Largest allowed log-probability gap; by default set by dtype and the gap of a fresh load."""


class CheckpointConfig(Section):
    interval: int = Field(default=20, ge=1)
    """Training steps between checkpoints; stage ends and interruptions always write one."""
    keep_last: int = Field(default=2, ge=1)
    """Newest checkpoints kept. One with an empty file `checkpoints/NAME.pinned` beside it stays too."""
    keep_every: int = Field(default=0, ge=0)
    """Checkpoints of weight versions that are multiples of this stay; 0 for none."""
    best_metric: str | None = "held_out/sampled_accuracy"
    """Metric whose best checkpoint stays, among those whose own step measured it; null for none."""
    best_mode: Literal["max", "min"] = "max"
    """Whether the largest or the smallest value is the best."""
    max_failed_saves: int = Field(default=2, ge=0)
    """Saves in a row that may fail, as on a full disk, while training goes on; one more ends the run, and so does one
    at the end of a stage or of an interrupted run."""


class EvaluationConfig(Section):
    prompts: int = Field(default=256, ge=1)
    """Held-out problems of one evaluation."""
    samples: int = Field(default=4, ge=0)
    """Sampled completions per problem, at temperature 1 and top_p 1; 0 leaves the sampled part out."""
    greedy: bool = True
    """Evaluate greedy decoding too."""
    search_answers: int = Field(default=0, ge=0)
    """Decode with tree search too, by the section search, until a tree has this many scored answers; 0 leaves it out.
    Only `rlsys evaluate` does."""
    interval: int = Field(default=0, ge=0)
    """Online steps between evaluations; 0 evaluates at the ends of stages only."""


def _check_deadlines(config: Config) -> None:
    """A living process must be able to keep a deadline."""
    for shorter, longer in (
        ("rewards.timeout_s", "actors.hang_timeout_s"),  # a verdict is progress
        ("actors.hang_timeout_s", "actors.rollout_timeout_s"),
        ("learner.hang_timeout_s", "learner.timeout_s"),
    ):
        low, high = (getattr(getattr(config, name.split(".")[0]), name.split(".")[1]) for name in (shorter, longer))
        if low > high:
            raise ValueError(f"{shorter} {low:g} exceeds {longer} {high:g}: raise the latter")


class Config(Section):
    run: RunConfig
    """Where and how the run lives."""
    stages: tuple[StageName, ...] = Field(default=("warm_start", "online"), min_length=1)
    """Stages in order: warm_start (settings: warm_start), search (search, extract), sft (sft), preference (preference,
    objective), online (train, objective, search)."""
    model: ModelConfig
    """The policy."""
    task: TaskConfig
    """Prompts, verifier, demonstrations."""
    actors: ActorsConfig = ActorsConfig()
    """Rollout actors."""
    sampling: SamplingConfig = SamplingConfig()
    """How training rollouts are drawn."""
    rewards: RewardsConfig = RewardsConfig()
    """Verifier processes."""
    learner: LearnerConfig = LearnerConfig()
    """DeepSpeed ranks."""
    warm_start: WarmStartConfig = WarmStartConfig()
    """The warm_start stage."""
    sft: SftStageConfig = SftStageConfig()
    """The sft stage."""
    preference: PreferenceStageConfig = PreferenceStageConfig()
    """The preference stage."""
    train: TrainConfig = TrainConfig()
    """The online stage."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """The joint loss of the stages online and preference."""
    weight_sync: WeightSyncConfig = WeightSyncConfig()
    """The weight-sync bus."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Held-out evaluation."""
    search: SearchConfig = SearchConfig()
    """Tree search: `rlsys search`, and the searched part of online training and evaluation."""
    extract: ExtractConfig = ExtractConfig()
    """What `rlsys extract` and searched training groups take out of a tree."""

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if len(set(self.stages)) != len(self.stages):
            raise ValueError("stages names a stage twice")
        if self.sampling.max_tokens >= self.actors.max_model_len:
            raise ValueError(
                f"sampling.max_tokens {self.sampling.max_tokens} leaves no room for a prompt "
                f"in actors.max_model_len {self.actors.max_model_len}"
            )
        if self.actors.tensor_parallel_size > 1 and self.run.device != "cuda":
            raise ValueError("actors.tensor_parallel_size above 1 needs run.device: cuda")
        _check_deadlines(self)
        if self.learner.optimizer_offload and self.learner.zero_stage == 0:
            raise ValueError("learner.optimizer_offload needs learner.zero_stage 1, 2 or 3")
        if self.learner.dtype == "bf16" and self.learner.zero_stage == 0:
            raise ValueError("learner.dtype bf16 needs learner.zero_stage 1, 2 or 3, which keep fp32 master weights")
        if self.search.fraction and self.search.model is None:
            # The learner's log-probabilities are those of the distribution that sampling names.
            for name in ("temperature", "top_p"):
                found, expected = getattr(self.search, name), getattr(self.sampling, name)
                if found not in (None, expected):
                    raise ValueError(
                        f"search.{name} {found} differs from sampling.{name} {expected}, at which the learner trains "
                        f"what the policy writes (search.fraction above 0): leave search.{name} out or make them equal"
                    )
        if self.objective.policy.overlong_buffer > self.sampling.max_tokens:
            raise ValueError(
                f"objective.policy.overlong_buffer {self.objective.policy.overlong_buffer} exceeds "
                f"sampling.max_tokens {self.sampling.max_tokens}"
            )
        self._check_objective()
        self._check_stages()
        scratch = self.model.from_scratch
        if scratch and scratch.max_positions < self.actors.max_model_len:
            raise ValueError(
                f"actors.max_model_len {self.actors.max_model_len} exceeds "
                f"model.from_scratch.max_positions {scratch.max_positions}"
            )
        try:
            resolve(self.search)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self

    def _check_objective(self) -> None:
        objective, searched = self.objective, self.search.fraction > 0
        policy, preference, sft = objective.policy, objective.preference, objective.sft
        if searched and policy.used:
            # A row of a searched group trains what the rows before it left: no row is a sequence to average over.
            for name, found, expected in (
                ("policy.aggregation", policy.aggregation, "token_mean"),
                ("policy.surrogate", policy.surrogate if policy.surrogate == "gspo" else "clip", "clip"),
                ("kl.in_reward", objective.kl.in_reward, False),
            ):
                if found != expected:
                    raise ValueError(
                        f"search.fraction {self.search.fraction:g} needs objective.{name} {expected}, found {found}"
                    )
        if "online" not in self.stages:
            return
        self._check_online_weights()
        from_file = preference.source == "file"
        if preference.used or (sft.used and sft.source == "chosen"):
            term = "objective.preference.weight" if preference.used else "objective.sft.weight with source chosen"
            if not from_file and not searched:
                raise ValueError(
                    f"{term} has no pairs in stage online: set search.fraction above 0, or "
                    "objective.preference.source to file"
                )
            extracted = self.extract.chosen != "none" if preference.pairs == "chains" else self.extract.step_preferences
            if not from_file and not extracted:
                field = "chosen" if preference.pairs == "chains" else "step_preferences"
                raise ValueError(f"{term} has no pairs in stage online: extract.{field} leaves them out")
            if from_file and not self.preference.path and "search" not in self._before("online"):
                raise ValueError("objective.preference.source file needs preference.path, or a stage search before")
            if not from_file and self.preference.path and "preference" not in self.stages:
                raise ValueError(
                    "preference.path is never read: stage online takes its pairs from the trees of the step; set "
                    "objective.preference.source to file, or leave preference.path out"
                )
        if sft.used and sft.source == "trees" and (not searched or self.extract.supervised == "none"):
            raise ValueError("objective.sft.source trees needs search.fraction above 0 and extract.supervised")

    def _check_online_weights(self) -> None:
        objective, steps = self.objective, self.train.max_steps
        policy, preference, sft = objective.policy, objective.preference, objective.sft
        if not (policy.used or preference.used or sft.used):
            raise ValueError(
                "stage online: the weights of objective.policy, objective.preference and objective.sft are all 0; "
                "raise one"
            )
        if not policy.used and self.search.fraction < 1:
            raise ValueError(
                "objective.policy.weight 0: the sampled prompts of stage online would train nothing; set "
                f"search.fraction to 1 (now {self.search.fraction:g}), or use the stages warm_start, sft or preference"
            )
        if objective.value.used and self.search.fraction == 1:
            raise ValueError(
                "objective.value.weight has no effect: the critic learns from sampled prompts alone, and "
                "search.fraction 1 leaves none; lower search.fraction, or set objective.policy.estimator to another "
                "than gae and objective.value.weight to 0"
            )
        if objective.value.warmup_steps >= steps:
            raise ValueError(
                f"objective.value.warmup_steps {objective.value.warmup_steps} leaves the policy no step of stage "
                f"online: expected fewer than train.max_steps, {steps}"
            )
        self._check_ends("online", ("policy", "value", "preference", "sft"))

    def _check_ends(self, stage: StageName, terms: tuple[str, ...]) -> None:
        """Every step has a term: weights are linear in between, so that the last and the first step tell."""
        last, objective = self.max_steps(stage) - 1, self.objective
        for step, end, field in ((last, "last", "final_weight"), (0, "first", "weight")):
            trained = [name for name in terms if name != "policy" or step >= objective.value.warmup_steps]
            if not any(getattr(objective, name).weight_at(step, last + 1) > 0 for name in trained):
                names = ", ".join(f"objective.{name}" for name in trained)
                raise ValueError(
                    f"stage {stage}: nothing is trained in its {end} step: raise {field} of one of {names}"
                )

    def _check_stages(self) -> None:
        if self.stages[-1] == "search":
            raise ValueError("stage search trains nothing: let another follow, or use `rlsys search`")
        for stage in ("sft", "preference"):
            if stage in self.stages and not getattr(self, stage).path and "search" not in self._before(stage):
                raise ValueError(f"stage {stage} has no data: set {stage}.path, or put the stage search before it")
        after = self.stages[self.stages.index("search") + 1 :] if "search" in self.stages else ()
        if after and not any(s in ("sft", "preference") or (s == "online" and self.pairs_online) for s in after):
            raise ValueError(
                "stage search extracts what no stage after it reads: let sft, preference, or online with "
                "objective.preference.source file follow, or take search out of stages"
            )
        objective = self.objective
        if "preference" in self.stages:
            if not (objective.preference.used or objective.sft.used):
                raise ValueError(
                    "stage preference: objective.preference.weight and objective.sft.weight are 0; raise one"
                )
            self._check_ends("preference", ("preference", "sft"))

    def _before(self, stage: StageName) -> tuple[StageName, ...]:
        return self.stages[: self.stages.index(stage)]

    @property
    def pairs_online(self) -> bool:
        """Whether the online stage trains on the pairs of the stage preference."""
        preference, sft = self.objective.preference, self.objective.sft
        wanted = preference.used or (sft.used and sft.source == "chosen")
        return "online" in self.stages and preference.source == "file" and wanted

    @property
    def reference(self) -> bool:
        """Whether the online stage keeps a reference policy beside the one it trains."""
        objective = self.objective
        kl = objective.policy.used and objective.kl.used
        pairs = objective.preference.used and objective.preference.source == "search"
        return "online" in self.stages and (kl or pairs)

    def max_steps(self, stage: StageName) -> int:
        """Training steps of a stage; the stage search makes none."""
        steps = {
            "warm_start": self.warm_start.max_steps,
            "search": 0,
            "sft": self.sft.max_steps,
            "preference": self.preference.max_steps,
            "online": self.train.max_steps,
        }
        return steps[stage]
