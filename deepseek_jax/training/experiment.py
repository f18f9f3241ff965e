"""A run as one frozen value: everything that decides its outcome, and nothing else."""

from __future__ import annotations

import dataclasses
import math

from deepseek_jax.config import ModelConfig, require
from deepseek_jax.data.config import DataConfig, TokenizerConfig
from deepseek_jax.parallel.mesh import ParallelConfig
from deepseek_jax.precision.policy import PrecisionPolicy
from deepseek_jax.training.optimizer import OptimizerConfig
from deepseek_jax.training.schedules import ScheduleConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How a run is judged while it trains and at its end."""

    every_steps: int = 0
    """Evaluate on held-out text every so many steps; 0 only at the end."""
    batch_rows: int = 16
    """Sequences evaluated at once."""
    max_bytes: int | None = None
    """Evaluations before the last one read about so many bytes of held-out text; None reads all of it."""
    samples: tuple[str, ...] = ()
    """Prompts that the model continues at its end."""
    sample_tokens: int = 128
    """Length of each continuation, in tokens."""

    def __post_init__(self):
        require(self.every_steps >= 0, f"evaluation.every_steps cannot be negative: {self.every_steps}")
        require(self.batch_rows >= 1, f"evaluation.batch_rows must be at least 1, not {self.batch_rows}")
        require(
            self.max_bytes is None or self.max_bytes > 0,
            f"evaluation.max_bytes must be positive or none, not {self.max_bytes}",
        )
        require(self.sample_tokens >= 1, f"evaluation.sample_tokens must be at least 1, not {self.sample_tokens}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a run saves itself."""

    every_steps: int = 1000
    """Save every so many steps; the end of a run, and SIGINT or SIGTERM, save as well."""
    keep_last: int = 3
    keep_best: int = 1
    """Checkpoints of lowest held-out bits per byte to keep besides the last ones; `evaluation.every_steps` measures."""
    directory: str | None = None
    """Where checkpoints go; none: `checkpoints` in the run's folder. Local, gs://… or s3://…"""

    def __post_init__(self):
        require(self.every_steps >= 1, f"checkpoint.every_steps must be at least 1, not {self.every_steps}")
        require(self.keep_last >= 1, f"checkpoint.keep_last must be at least 1, not {self.keep_last}")
        require(self.keep_best >= 0, f"checkpoint.keep_best cannot be negative: {self.keep_best}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MovingAverageConfig:
    """An exponential moving average of the weights in host memory (section 3.2.3): see `training.moving_average`."""

    decay: float = 0.999
    """What is left of the weight of older terms after an update. The paper gives no number; this one remembers about a
    thousand updates."""
    every_steps: int = 1
    """Update it after every so many steps; the paper does after each."""

    def __post_init__(self):
        require(0 <= self.decay < 1, f"moving_average.decay must lie in [0, 1), not {self.decay}")
        require(self.every_steps >= 1, f"moving_average.every_steps must be at least 1, not {self.every_steps}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What a run says about itself."""

    every_steps: int = 10
    """Log every so many steps. A process that is alone waits for the device only at these; several agree on whether to
    go on after every step."""
    tensorboard: bool = True
    wandb: str | None = None
    """Weights & Biases project; none logs nothing there."""
    watchdog_seconds: float | None = None
    """A process that makes no step for so long prints what its threads are at and ends the run; evaluations,
    checkpoints and compilations may take four times as long. 0: never; none: half an hour where there are several
    processes, which hang without a word when one is stuck, and never for one alone."""

    def __post_init__(self):
        require(self.every_steps >= 1, f"logging.every_steps must be at least 1, not {self.every_steps}")
        require(
            self.watchdog_seconds is None or 0 <= self.watchdog_seconds < math.inf,
            f"logging.watchdog_seconds must be a number of seconds, 0 or none, not {self.watchdog_seconds}",
        )

    def watchdog_limit(self, processes: int) -> float:
        """Seconds without a step after which each of so many processes ends; 0 for never."""
        if self.watchdog_seconds is not None:
            return self.watchdog_seconds
        return 1800.0 if processes > 1 else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """A complete, resolved run. A recipe is a function without arguments that returns one."""

    model: ModelConfig
    schedule: ScheduleConfig
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionPolicy = PrecisionPolicy()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    moving_average: MovingAverageConfig | None = None
    """The moving average of the weights; none keeps none. `--set "moving_average=MovingAverageConfig()"` keeps one."""
    logging: LoggingConfig = LoggingConfig()
    init_from: str | None = None
    """Where the first weights come from: `hf:` and a Hugging Face folder, or a run's folder; none: the seed. Set by
    `--init_from`, which takes the architecture and the tokenizer from there as well."""
    seed: int = 0
    """Decides initial weights and the order of data."""
    weights_seed: int | None = None
    """Decides the initial weights instead, where it is given: the same data in the same order from other weights."""
    mask_documents: bool = False
    """Keep attention and predictions within each packed document (SFT). Pre-training does not (section 4.1)."""
    force_balanced_routing: bool = False
    """Send tokens to experts in turn, whatever the router says: for benchmarks of speed. Nothing useful is learnt."""
    balance_from_routed: bool = False
    """Take the balance loss's fractions from the routed experts, not from the top-K of the raw scores."""
    cannot_run: str | None = None
    """Why this can be planned (`python -m tools.plan`) and not run yet; none where it can. A run refuses."""

    def check_runs(self) -> None:
        """Raises ConfigError where this can only be planned."""
        require(
            self.cannot_run is None,
            f"this recipe can be planned (python -m tools.plan) but not run: {self.cannot_run}; to try all the same: "
            "--set cannot_run=none",
        )

    def __post_init__(self):
        require(
            self.tokenizer.path is not None or self.tokenizer.vocab_size <= self.model.vocab_size,
            f"tokenizer.vocab_size ({self.tokenizer.vocab_size}) exceeds model.vocab_size ({self.model.vocab_size})",
        )
        require(
            self.data.sequence_length > self.model.mtp_depth + 1,
            f"data.sequence_length ({self.data.sequence_length}) leaves MTP depth {self.model.mtp_depth} no label",
        )
        require(
            self.init_from is None or self.tokenizer.path is not None,
            "init_from needs the tokenizer of its weights: start with --init_from, or set tokenizer.path as well",
        )
        yarn = self.model.attention.yarn
        require(
            yarn is None or self.data.sequence_length <= yarn.original_length * yarn.factor,
            f"data.sequence_length ({self.data.sequence_length}) is beyond YaRN's "
            f"{yarn and int(yarn.original_length * yarn.factor)} tokens; raise model.attention.yarn.factor",
        )
