"""Settings: the schema, reading it from YAML, and the plan that is resolved from it."""

from pretrain.config.load import dump, load
from pretrain.config.plan import Plan, resolve
from pretrain.config.schema import (
    AugmentConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EngineConfig,
    InitConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    ResizeKernel,
    RunConfig,
    SourceConfig,
    TrackingConfig,
    TrainConfig,
)

__all__ = [
    "AugmentConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EngineConfig",
    "InitConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "Plan",
    "ResizeKernel",
    "RunConfig",
    "SourceConfig",
    "TrackingConfig",
    "TrainConfig",
    "dump",
    "load",
    "resolve",
]
