"""The types of the configuration's keys: one dataclass for each file under conf/ that has keys of its own.

Plain Python: Hydra and OmegaConf read these classes and are not needed to define them. The values, and what they mean,
stand in the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from diagnostics.clip_schemas import CLIP_SCHEMAS, MISSING

# OmegaConf 2.3 knows no Literal; names that are keywords of Python need the functional form.
Activation = Enum("Activation", ["relu", "tanh", "sigmoid", "gelu", "identity"])
Init = Enum("Init", ["default", "kaiming", "xavier", "orthogonal"])
Norm = Enum("Norm", ["none", "layer", "batch"])
CnnNorm = Enum("CnnNorm", ["none", "batch", "group"])
RecurrentInit = Enum("RecurrentInit", ["default", "orthogonal"])
RecurrentActivation = Enum("RecurrentActivation", ["tanh", "relu"])
NormPosition = Enum("NormPosition", ["pre", "post"])
Precision = Enum("Precision", ["fp32", "bf16", "fp16"])
LearningRateSchedule = Enum("LearningRateSchedule", ["constant", "linear", "cosine"])
Mistake = Enum(
    "Mistake",
    [
        "none",
        "missing_zero_grad",
        "zero_grad_before_step",
        "step_without_grads",
        "clip_before_backward",
        "clip_after_step",
        "clip_mid_accumulation",
        "clip_scaled_grads",
        "clip_subset",
        "clip_ineffective",
        "param_not_in_optimizer",
        "optimizer_param_not_in_model",
        "no_update",
        "window_size",
        "dropped_window",
    ],
)
NonFinite = Enum("NonFinite", ["skip", "raise", "step"])
Reaction = Enum("Reaction", ["warn", "raise", "record"])
TrainerReaction = Enum("TrainerReaction", ["warn", "stop", "raise", "record"])
WandbMode = Enum("WandbMode", ["offline", "online", "disabled"])


@dataclass
class DigitsConfig:
    """conf/task/digits.yaml."""

    _target_: str = "diagnostics.trainers.tasks.Digits"


@dataclass
class SeedChainConfig:
    """conf/task/seed_chain.yaml."""

    _target_: str = "diagnostics.trainers.seed_chain.SeedChain"
    story: bool = MISSING


@dataclass
class PySourceConfig:
    """conf/task/pysource.yaml."""

    _target_: str = "diagnostics.trainers.text.PySource"
    context: int = MISSING


@dataclass
class TemporalOrderConfig:
    """conf/task/temporal_order.yaml."""

    _target_: str = "diagnostics.trainers.sequences.TemporalOrder"
    lag: int = MISSING


@dataclass
class AddingConfig:
    """conf/task/adding.yaml."""

    _target_: str = "diagnostics.trainers.sequences.Adding"
    lag: int = MISSING


@dataclass
class MNISTConfig:
    """conf/task/mnist.yaml."""

    _target_: str = "diagnostics.trainers.vision.MNIST"
    folder: str = MISSING
    download: bool = MISSING


@dataclass
class CIFAR10Config(MNISTConfig):
    """conf/task/cifar10.yaml."""

    _target_: str = "diagnostics.trainers.vision.CIFAR10"


@dataclass
class SigmoidChainConfig:
    """conf/model/sigmoid_chain.yaml."""

    _target_: str = "diagnostics.trainers.seed_chain.SigmoidChain"
    depth: int = MISSING


@dataclass
class MLPConfig:
    """conf/model/mlp.yaml."""

    _target_: str = "diagnostics.trainers.models.MLP"
    depth: int = MISSING
    width: int = MISSING
    activation: Activation = MISSING
    init: Init = MISSING
    gain: float | None = None
    norm: Norm = MISSING
    residual: bool = MISSING


@dataclass
class CNNConfig:
    """conf/model/cnn.yaml."""

    _target_: str = "diagnostics.trainers.cnn.CNN"
    depth: int = MISSING
    width: int = MISSING
    activation: Activation = MISSING
    init: Init = MISSING
    norm: CnnNorm = MISSING
    residual: bool = MISSING


@dataclass
class GRUConfig:
    """conf/model/gru.yaml."""

    _target_: str = "diagnostics.trainers.recurrent.GRU"
    width: int = MISSING
    fused: bool = MISSING
    recurrent_init: RecurrentInit = MISSING
    recurrent_scale: float = MISSING


@dataclass
class RNNConfig(GRUConfig):
    """conf/model/rnn.yaml."""

    _target_: str = "diagnostics.trainers.recurrent.RNN"
    activation: RecurrentActivation = MISSING


@dataclass
class LSTMConfig(GRUConfig):
    """conf/model/lstm.yaml."""

    _target_: str = "diagnostics.trainers.recurrent.LSTM"
    forget_bias: float | None = MISSING


@dataclass
class GPTConfig:
    """conf/model/gpt.yaml."""

    _target_: str = "diagnostics.trainers.gpt.GPT"
    depth: int = MISSING
    width: int = MISSING
    heads: int = MISSING
    norm_position: NormPosition = MISSING
    tied: bool = MISSING
    dropout: float = MISSING


@dataclass
class SGDConfig:
    """conf/optimizer/sgd.yaml."""

    _target_: str = "torch.optim.SGD"
    lr: float = MISSING
    momentum: float = MISSING
    nesterov: bool = MISSING
    weight_decay: float = MISSING


@dataclass
class AdamConfig:
    """conf/optimizer/adam.yaml."""

    _target_: str = "torch.optim.Adam"
    lr: float = MISSING
    betas: tuple[float, float] = MISSING
    eps: float = MISSING
    weight_decay: float = MISSING


@dataclass
class AdamWConfig(AdamConfig):
    """conf/optimizer/adamw.yaml."""

    _target_: str = "torch.optim.AdamW"


@dataclass
class ThresholdsConfig:
    """The thresholds in conf/diagnostics/standard.yaml."""

    _target_: str = "diagnostics.Thresholds"
    notice_decades: float = MISSING
    warning_decades: float = MISSING
    severe_decades: float = MISSING
    hysteresis: float = MISSING
    stalled_decades: float = MISSING
    broken_decades: float = MISSING
    dead_units: float = MISSING
    underflow_share: float = MISSING
    denormal_share: float = MISSING
    clipped_share: float = MISSING
    clipped_coefficient: float = MISSING
    still_ratio: float = MISSING
    spike_decades: float = MISSING
    spike_sigmas: float = MISSING
    history: int = MISSING
    confirm: int = MISSING
    clear: int = MISSING
    lasting_share: float = MISSING
    recovered_loss: float = MISSING
    standing_share: float = MISSING
    standing_steps: int = MISSING


@dataclass
class WatchingConfig:
    """What every Monitor is told, ours and that of somebody else's app."""

    every: int = MISSING
    layers: str | None = None
    nonfinite: NonFinite = MISSING
    on_violation: Reaction = MISSING
    asynchronous: bool = MISSING
    fold: bool = MISSING
    thresholds: ThresholdsConfig = field(default_factory=ThresholdsConfig)


@dataclass
class DiagnosticsConfig(WatchingConfig):
    """conf/diagnostics/standard.yaml."""

    on_diagnosis: TrainerReaction = MISSING
    second_opinion: bool = MISSING


@dataclass
class ConsoleSinkConfig:
    """conf/sink/console.yaml."""

    _target_: str = "diagnostics.ConsoleSink"


@dataclass
class RunLogSinkConfig:
    """conf/sink/runlog.yaml."""

    _target_: str = "diagnostics.RunLogSink"
    path: str = MISSING


@dataclass
class WandbSinkConfig:
    """conf/sink/wandb.yaml."""

    project: str = MISSING
    mode: WandbMode = MISSING
    wandb_group: str | None = None
    notes: str | None = None
    profile_every: int = MISSING
    per_layer: bool = MISSING
    media: bool = MISSING
    upload_run_log: bool = MISSING
    alerts: bool = MISSING


@dataclass
class SinksConfig:
    """The sinks that ``sink=[...]`` chose; None for the others."""

    console: ConsoleSinkConfig | None = None
    runlog: RunLogSinkConfig | None = None
    wandb: WandbSinkConfig | None = None


@dataclass
class TrainerConfig:
    """conf/trainer/default.yaml."""

    _target_: str = "diagnostics.trainers.settings.TrainerSettings"
    steps: int = MISSING
    batch_size: int = MISSING
    micro_batches: int = MISSING
    evaluate_every: int = MISSING
    patience: int = MISSING
    precision: Precision = MISSING
    schedule: LearningRateSchedule = MISSING
    warmup_steps: int = MISSING
    compile: bool = MISSING
    seed: int = MISSING
    device: str = MISSING
    threads: int = MISSING
    preflight: bool = MISSING
    mistake: Mistake = MISSING
    objective: str = MISSING


@dataclass
class TrainConfig:
    """conf/train.yaml. A group whose options have different keys is Any here and typed by the option's own schema."""

    task: Any = MISSING
    model: Any = MISSING
    optimizer: Any = MISSING
    clip: Any = MISSING
    diagnostics: DiagnosticsConfig = field(default_factory=DiagnosticsConfig)
    sink: SinksConfig = field(default_factory=SinksConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    trusted_packages: list[str] = field(default_factory=list)


@dataclass
class MonitorRunLogConfig(RunLogSinkConfig):
    """The option ``diagnostics/sink=runlog`` of somebody else's app."""

    _target_: str = "diagnostics.jobs.open_run_log"


@dataclass
class MonitorWandbConfig:
    """The option ``diagnostics/sink=wandb`` of somebody else's app, which opens the W&B run itself."""

    _target_: str = "diagnostics.WandbSink"
    every: int = 1
    profile_every: int = 10
    per_layer: bool = False
    media: bool = True
    upload_run_log: bool = True
    alerts: bool = True


@dataclass
class MonitorSinksConfig:
    """The sinks that ``diagnostics/sink=[...]`` chose; None for the others."""

    console: ConsoleSinkConfig | None = None
    runlog: MonitorRunLogConfig | None = None
    wandb: MonitorWandbConfig | None = None


@dataclass
class MonitorConfig(WatchingConfig):
    """The section ``diagnostics`` of somebody else's app."""

    _target_: str = "diagnostics.jobs.make_monitor"
    _partial_: bool = True
    _recursive_: bool = False  # each Monitor opens its own sinks, when it is made
    on_diagnosis: Reaction = MISSING
    accumulate: int = 1
    clip: Any = MISSING
    sink: MonitorSinksConfig = field(default_factory=MonitorSinksConfig)
    defaults: list[Any] = field(default_factory=lambda: ["_self_", {"clip": "none"}, {"sink": ["console", "runlog"]}])


SCHEMAS: Mapping[str, type] = {
    "task_digits": DigitsConfig,
    "task_seed_chain": SeedChainConfig,
    "task_pysource": PySourceConfig,
    "task_temporal_order": TemporalOrderConfig,
    "task_adding": AddingConfig,
    "task_mnist": MNISTConfig,
    "task_cifar10": CIFAR10Config,
    "model_mlp": MLPConfig,
    "model_cnn": CNNConfig,
    "model_rnn": RNNConfig,
    "model_gru": GRUConfig,
    "model_lstm": LSTMConfig,
    "model_gpt": GPTConfig,
    "model_sigmoid_chain": SigmoidChainConfig,
    "optimizer_sgd": SGDConfig,
    "optimizer_adam": AdamConfig,
    "optimizer_adamw": AdamWConfig,
    **CLIP_SCHEMAS,
}
