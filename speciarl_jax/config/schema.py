"""Schema of a recipe: plain mutable dataclasses, one comment with the unit per field.

A recipe under ``configs/`` builds a `Config`; the command line overrides single fields
(``--config.train.num_steps=6``). `Config.validate` turns impossible combinations into one line
that says what to set. Sub-configs go down to their rooms, never the whole config.

No postponed annotations here: ml_collections reads the field types to parse overrides.
"""

import dataclasses
import itertools

from speciarl_jax.config.definition import check_definition, require
from speciarl_jax.config.judge import JudgeConfig
from speciarl_jax.config.ranges import check_choices, check_fields, check_ranges, check_sources

OBJECTIVES = ("grpo", "dr_grpo", "dapo", "gspo", "rloo", "sft")
AGGREGATIONS = (
    "token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)
REWARDS = ("dynamic", "single", "binary", "scale1", "scale2", "scale3")


_CHOICES: dict[str, tuple[str, ...]] = {
    "model.param_dtype": ("float32", "bfloat16"),
    "model.compute_dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "dots", "full"),
    "algo.name": OBJECTIVES,
    "algo.reward": REWARDS,
    "algo.aggregation": AGGREGATIONS,
    "algo.normalization": ("global", "verl"),
    "algo.old_logprobs": ("recompute", "rollout"),
    "rollout.kv_cache_dtype": ("compute", "int8"),
    "rollout.scope": ("auto", "job", "host"),
    "eval.format_failures": ("wrong", "separate", "drop"),
    "optim.schedule": ("constant", "cosine", "linear"),
}
_OWN_CODE = ("algo.name", "algo.reward")  # may be the dotted path of a user's function instead


@dataclasses.dataclass
class ModelConfig:
    """Which policy, and how it computes."""

    path: str = "tiny"  # Hugging Face directory or hub id; "tiny" is the checkpoint in the package
    param_dtype: str = "float32"  # storage of the frozen base: float32 or bfloat16
    compute_dtype: str = "float32"  # activations: float32 or bfloat16
    remat: str = "none"  # none, dots (keep matmul outputs) or full (keep block inputs only)
    train_base: bool = False  # True: full fine-tuning of the language model, no adapter
    train_vision: bool = False  # True: gradients reach the vision tower and merger too

    @property
    def compute_bytes(self) -> int:
        """Of one activation."""
        return 4 if self.compute_dtype == "float32" else 2


@dataclasses.dataclass
class LoraConfig:
    """Low-rank adapter on linear layers."""

    rank: int = 64  # r; 0 disables the adapter (only with model.train_base)
    alpha: float = 32.0  # the update is scaled by alpha / rank
    targets: str = r"^text/blocks/(.*/)?(q|k|v|o|gate|up|down)_proj$"  # regex on module paths


@dataclasses.dataclass
class DataConfig:
    """Where prompts come from and how images become patches."""

    source: str = "field_guide_birds"  # a source name of `speciarl data list`
    split: str = "train"
    eval_sources: tuple[str, ...] = ("field_guide_birds",)
    eval_split: str = "test"
    validation_split: str = "validation"  # of validations; sources without it: num_validation held
    in_domain: tuple[str, ...] = ("field_guide_birds",)  # averaged as in_domain in reports
    num_train: int = 0  # images taken from the split, 0 for all
    num_eval: int = 0  # images per evaluation source, 0 for all
    num_validation: int = 0  # per validation; or as many held out of split, 0 then none
    data_dir: str = ""  # root of prepared data sets; "" for ~/.cache/speciarl/data
    prompt: str = "specific"  # file name under configs/prompts/ (without .txt) or a path
    min_pixels: int = 0  # image area limits, px; 0 takes the model's preprocessor_config.json
    max_pixels: int = 0
    max_prompt_tokens: int = 2048  # longer prompts are filtered out, image tokens included
    num_workers: int = 0  # Grain worker processes
    bad_image_budget_frac: float = 0.05  # stop if a larger share of images cannot be read
    include_classes: tuple[str, ...] = ()  # train on these ground truths only
    exclude_classes: tuple[str, ...] = ()  # but not on these
    select_seed: int = 42  # of the subset; a smaller subset is part of a larger one
    num_threads: int = 2  # decoding threads
    cache_mb: int = 256  # resized images kept between epochs, MiB (num_workers=0 only)
    prefetch_batches: int = 2  # finished batches held ready
    prompt_buckets: tuple[int, ...] = ()  # padded prompt lengths, tokens; () multiples of 32
    window_buckets: tuple[int, ...] = ()  # padded windows per image; () steps of a third


@dataclasses.dataclass
class RolloutConfig:
    """Sampling."""

    group_size: int = 10  # N, rollouts per prompt
    max_completion_tokens: int = 2048
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_strings: tuple[str, ...] = ()  # e.g. ("</answer>",)
    chunk_tokens: int = 32  # decode steps between two looks at which rollouts have finished
    compact: bool = True  # drop finished rows from the decode batch between chunks
    scope: str = (
        "auto"  # host, or job: one program of all processes; auto: job on several TPU hosts
    )
    early_exit: bool = True  # end a chunk when enough rows are done; needs collectives in a process
    kv_cache_dtype: str = "compute"  # or int8: half of bfloat16's cache; log-probs move < 1e-2
    max_cache_mb: int = 0  # of a rollout on a device, MiB; beyond it waves of prompts; 0: no limit
    warm_up: bool = False  # compile every shape before step one; needs data.*_buckets


@dataclasses.dataclass
class AlgoConfig:
    """Reward, advantage and loss."""

    name: str = "grpo"  # one of OBJECTIVES, or a dotted path to an advantage function
    reward: str = "dynamic"  # one of REWARDS, or a dotted path to a reward function
    bar_support: float = 1.0  # m: answers that must reach the bar; below 1 a share of the group
    label_noise: float = 0.0  # probability that a label moves one rung
    failed_quorum_frac: float = 0.2  # a group with more failed labels than this share is dropped
    failed_budget_frac: float = 0.5  # more failed labels, or dropped groups, in a step stop the run
    aggregation: str = "token-mean"
    normalization: str = "global"  # or "verl": means per micro-batch, as verl computes them
    verl_micro_batch: int = 0  # sequences in a verl micro-batch
    verl_ranks: int = 1
    clip_eps_low: float = 0.2
    clip_eps_high: float = 0.2
    clip_dual: float = 3.0  # c; 0 disables the dual clip
    kl_coef: float = 0.01
    entropy_coef: float = 0.0
    norm_by_std: bool = True
    overlong_buffer_tokens: int = 0  # DAPO: linear penalty over the last tokens; 0 disables
    dynamic_sampling: bool = False  # DAPO: drop groups without spread, sample more
    generation_prompts: int = 0  # prompts generated at a time; 0: train.prompts_per_step
    max_generation_batches: int = 10  # dynamic sampling stops the run beyond that many
    old_logprobs: str = "recompute"  # or "rollout": the sampler's own log-probs
    importance_cap: float = 0.0  # truncated importance sampling, sampler to trainer; 0 is off


@dataclasses.dataclass
class OptimConfig:
    """AdamW."""

    learning_rate: float = 3e-5
    schedule: str = "constant"  # constant, cosine or linear (to 0 at train.num_steps)
    warmup_steps: int = 0
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    max_skipped_updates: int = 10  # non-finite gradients in a row before the run stops


@dataclasses.dataclass
class TrainConfig:
    """The loop."""

    num_steps: int = 165  # rollout batches (sft: updates); 0 scores the base and trains nothing
    prompts_per_step: int = 256  # P
    prompts_per_update: int = 128  # mini-batch; prompts_per_step / this many updates per step
    prompts_per_micro_batch: int = 8  # prompts in one forward-backward of a replica, at most
    micro_batch_tokens: int = 0  # padded tokens at once per replica, packed; 0: fixed micro-batches
    async_steps: int = 0  # 1: the next rollout overlaps this update
    table_every: int = 10  # steps between printed rollout tables, 0 for never
    save_every: int = 10  # steps between checkpoints
    keep_checkpoints: int = 3  # newest ones
    keep_best: int = 0  # beside them: those with the highest eval/all/hm at their validation
    eval_every: int = 0  # steps between validations (the first before step 1), 0 for none
    sft_target: str = "answer"  # answer, field_guide, or a dotted path (objective sft only)
    logprob_chunk_tokens: int = 1024  # tokens whose logits exist at once
    mismatch_gate: float = 1e-3  # stop at step one if sampler and trainer disagree by more


@dataclasses.dataclass
class EvalConfig:
    """Scoring before, during and after training."""

    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    samples: int = 1
    max_completion_tokens: int = 2048
    prompts_per_batch: int = 64
    format_failures: str = "wrong"  # wrong, separate or drop
    bootstrap_samples: int = 2000
    policy_samples: int = 0  # answers per image drawn as in training, scored beside the greedy ones
    score_base: bool = True  # score before training, into eval/base
    score_trained: bool = True  # score after training, into eval/trained
    best_of: int = 0  # N of the base's best-of-N upper bound; 0 skips it
    best_of_temperature: float = 1.0
    best_of_top_p: float = 1.0
    judge: JudgeConfig = dataclasses.field(default_factory=JudgeConfig)
    use_train_judge: bool = True  # False: score with eval.judge instead of judge


@dataclasses.dataclass
class LoggingConfig:
    """Where numbers go beside ``metrics.jsonl`` and TensorBoard."""

    wandb_project: str = ""  # Weights & Biases project (needs the `wandb` extra); "" for none


@dataclasses.dataclass
class MeshConfig:
    """Device mesh; -1 takes what the other axes leave. See `speciarl_jax.devices.mesh`."""

    data: int = -1  # replicas: prompts are spread over them, weights are copied
    fsdp: int = 1  # prompts are spread over it too, weights are cut
    tensor: int = 1  # heads, MLP columns and vocabulary are spread over it
    auto: bool = False  # choose the smallest replica that holds the model; says why


@dataclasses.dataclass
class Config:
    """One recipe."""

    name: str = "unnamed"
    seed: int = 0
    compile_cache_dir: str = "~/.cache/speciarl/xla"  # compiled programs, kept for later; "" for no
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
    judge: JudgeConfig = dataclasses.field(default_factory=JudgeConfig)
    algo: AlgoConfig = dataclasses.field(default_factory=AlgoConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    logging: LoggingConfig = dataclasses.field(default_factory=LoggingConfig)

    @property
    def has_adapter(self) -> bool:
        """A low-rank adapter is trained, not the base."""
        return self.lora.rank > 0 and not self.model.train_base

    @property
    def updates_per_step(self) -> int:
        """Optimiser updates of a step: mini-batches of its rollouts."""
        return self.train.prompts_per_step // self.train.prompts_per_update

    @property
    def num_updates(self) -> int:
        """Optimiser updates of the whole run."""
        return self.train.num_steps * self.updates_per_step

    @property
    def generation_prompts(self) -> int:
        """Prompts sampled at a time, which is what the loader puts into one batch."""
        return self.algo.generation_prompts or self.train.prompts_per_step

    @property
    def needs_old_logprobs(self) -> bool:
        """The trainer's own log-probs of the sampled tokens are needed before the first update.

        With one update a step they are the update's own, so exactly on-policy; several updates
        move away from them, and the importance weights compare them with the sampler's.
        """
        algo = self.algo
        moves_away = self.updates_per_step > 1 and algo.old_logprobs == "recompute"
        return moves_away or algo.importance_cap > 0

    def validate(self) -> None:
        """Checks every field against its range and the fields against each other.

        Pure and offline: what needs files, the network or a user's code is asked by
        `run.preflight`.

        Raises:
            ValueError: one line naming the field, its value, and what to set.
        """
        check_fields(self)
        check_choices(self, _CHOICES, _OWN_CODE)
        check_ranges(self)
        _check_algo(self)
        _check_trainable(self)
        check_definition(self.algo)
        _check_sampling(self)
        _check_train(self)
        _check_lengths(self)
        _check_evaluation(self)
        self.judge.validate()
        if not self.eval.use_train_judge:
            self.eval.judge.validate()


def _check_algo(config: Config) -> None:
    algo, size = config.algo, config.rollout.group_size
    require(
        config.lora.rank > 0 or config.model.train_base,
        f"lora.rank={config.lora.rank}: nothing would be trained; set lora.rank >= 1 or "
        "model.train_base=true",
    )
    require(
        algo.normalization == "global" or algo.verl_micro_batch > 0,
        "algo.normalization='verl': set algo.verl_micro_batch to verl's sequences per micro-batch",
    )
    require(
        not (algo.importance_cap and algo.old_logprobs == "rollout"),
        f"algo.importance_cap={algo.importance_cap} with algo.old_logprobs='rollout': the ratio to "
        "the sampler would be applied twice; set importance_cap=0 or old_logprobs=recompute",
    )
    require(
        size >= 2 or algo.name == "sft",
        f"rollout.group_size={size}: every advantage would be 0; set rollout.group_size >= 2",
    )
    support, limit = algo.bar_support, config.rollout.max_completion_tokens
    require(
        support <= 1 or support % 1 == 0,
        f"algo.bar_support={support}: set a whole number of answers, or a share between 0 and 1",
    )
    require(
        support <= size or algo.name == "sft",
        f"algo.bar_support={support:g}: a group has rollout.group_size={size} answers, so the bar "
        "would never rise; set at most that",
    )
    require(
        algo.overlong_buffer_tokens <= limit,
        f"algo.overlong_buffer_tokens={algo.overlong_buffer_tokens}: the penalty would begin "
        f"before the first token of rollout.max_completion_tokens={limit}; set at most that",
    )


def _check_trainable(config: Config) -> None:
    """Refuses what would train wrongly, or fail once the rollouts are paid for."""
    model, algo = config.model, config.algo
    trained = " and ".join(
        f"model.{name}=true" for name in ("train_base", "train_vision") if getattr(model, name)
    )
    require(
        not trained or algo.kl_coef == 0 or algo.name == "sft",
        f"algo.kl_coef={algo.kl_coef:g} with {trained}: the reference of the KL is the base, which "
        "is trained away and of which no second copy is kept; set algo.kl_coef=0",
    )
    require(
        not trained or model.param_dtype == "float32",
        f"model.param_dtype={model.param_dtype} with {trained}: steps of a usual learning rate are "
        "smaller than its roundings, so few weights would move; set model.param_dtype=float32 "
        "(model.compute_dtype=bfloat16 may stay)",
    )


def _check_sampling(config: Config) -> None:
    """Dynamic sampling, and rollouts that are a step old."""
    algo, train = config.algo, config.train
    is_sft = algo.name == "sft"
    require(
        not (is_sft and (algo.dynamic_sampling or train.async_steps or algo.importance_cap)),
        "algo.name=sft samples nothing: leave algo.dynamic_sampling, train.async_steps and "
        "algo.importance_cap off",
    )
    require(
        algo.dynamic_sampling or not algo.generation_prompts,
        f"algo.generation_prompts={algo.generation_prompts}: only with algo.dynamic_sampling=true",
    )
    most = (algo.generation_prompts or train.prompts_per_step) * algo.max_generation_batches
    require(
        not algo.dynamic_sampling or most >= train.prompts_per_step,
        f"algo.max_generation_batches={algo.max_generation_batches} of {algo.generation_prompts} "
        f"prompts cannot fill train.prompts_per_step={train.prompts_per_step}; raise one of them",
    )
    require(
        not train.async_steps or algo.importance_cap > 0 or algo.old_logprobs == "rollout",
        "train.async_steps=1: rollouts are a step old and need a correction; set "
        "algo.importance_cap (2 is usual) or algo.old_logprobs=rollout",
    )


def _check_evaluation(config: Config) -> None:
    """Refuses validations on the pictures that are reported, or on those that are trained on."""
    data = config.data
    for split, what in ((data.eval_split, "reported"), (data.split, "trained on")):
        require(
            not config.train.eval_every or data.validation_split != split,
            f"data.validation_split={split!r} with train.eval_every={config.train.eval_every}: "
            f"validations would look at what is {what}, and train.keep_best would choose by it; "
            "leave data.validation_split=validation and, for sources without that split, set "
            "data.num_validation to hold so many pictures out of training",
        )
    check_sources(data.source, data.eval_sources)


def _check_train(config: Config) -> None:
    train, rollout = config.train, config.rollout
    sizes = ("prompts_per_step", "prompts_per_update", "prompts_per_micro_batch")
    for outer, inner in itertools.pairwise(sizes):
        whole, part = getattr(train, outer), getattr(train, inner)
        require(
            whole % part == 0, f"train.{outer}={whole} is not a multiple of train.{inner}={part}"
        )
    largest = config.data.max_prompt_tokens + rollout.group_size * rollout.max_completion_tokens
    require(
        train.micro_batch_tokens == 0 or train.micro_batch_tokens >= largest,
        f"train.micro_batch_tokens={train.micro_batch_tokens}: one group takes up to {largest} "
        "(data.max_prompt_tokens + rollout.group_size x rollout.max_completion_tokens); set at "
        "least that, or 0",
    )
    require(
        not rollout.warm_up or bool(config.data.prompt_buckets and config.data.window_buckets),
        "rollout.warm_up=true: set data.prompt_buckets and data.window_buckets, the shapes that "
        "are compiled before step one",
    )


def _check_lengths(config: Config) -> None:
    """In 16 bit a GPU runs cuDNN's attention, which has no gradient for odd lengths."""
    limit = ("rollout.max_completion_tokens", config.rollout.max_completion_tokens)
    buckets = [("data.prompt_buckets", size) for size in config.data.prompt_buckets]
    for field, size in [limit, *buckets] if config.model.compute_dtype != "float32" else []:
        require(
            size % 2 == 0,
            f"{field}: {size} is odd, and with model.compute_dtype={config.model.compute_dtype} a "
            f"GPU has no gradient of attention over an odd length; set {size + 1}",
        )


def micro_batch_prompts(train: TrainConfig, num_replicas: int) -> int:
    """Prompts in one forward-backward of a replica: the most that cut its share evenly."""
    share = train.prompts_per_update // num_replicas
    sizes = range(min(train.prompts_per_micro_batch, share), 0, -1)
    return next(size for size in sizes if share % size == 0)
