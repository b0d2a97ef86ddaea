"""Settings: the schema, reading it from YAML, and the plan that is resolved from it."""

from pretrain.config.load import dump, load
from pretrain.config.plan import Plan, resolve
from pretrain.config.schema import (
    AugmentConfig,
    BigVisionRandAugmentConfig,
    CheckpointConfig,
    ColorJitterConfig,
    Config,
    DataConfig,
    EngineConfig,
    InitConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RandomErasingConfig,
    ResizeKernel,
    RunConfig,
    SourceConfig,
    TimmRandAugmentConfig,
    TrackingConfig,
    TrainConfig,
)

__all__ = [
    "AugmentConfig",
    "BigVisionRandAugmentConfig",
    "CheckpointConfig",
    "ColorJitterConfig",
    "Config",
    "DataConfig",
    "EngineConfig",
    "InitConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "Plan",
    "RandomErasingConfig",
    "ResizeKernel",
    "RunConfig",
    "SourceConfig",
    "TimmRandAugmentConfig",
    "TrackingConfig",
    "TrainConfig",
    "dump",
    "load",
    "resolve",
]
