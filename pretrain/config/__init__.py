"""Settings: the schema, reading it from YAML, and the plan that is resolved from it."""

from pretrain.config.augment import (
    AugmentConfig,
    BigVisionRandAugmentConfig,
    ColorJitterConfig,
    RandomErasingConfig,
    TimmRandAugmentConfig,
)
from pretrain.config.data import DataConfig, SourceConfig, TrainSourceConfig
from pretrain.config.evaluation import for_evaluation
from pretrain.config.load import dump, load
from pretrain.config.model import ModelConfig, PosEmbed
from pretrain.config.plan import Plan, resolve
from pretrain.config.schema import (
    CheckpointConfig,
    Config,
    EngineConfig,
    InitConfig,
    ObjectiveConfig,
    OptimConfig,
    ProfileConfig,
    RecoveryConfig,
    ResizeKernel,
    RunConfig,
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
    "PosEmbed",
    "ProfileConfig",
    "RandomErasingConfig",
    "RecoveryConfig",
    "ResizeKernel",
    "RunConfig",
    "SourceConfig",
    "TimmRandAugmentConfig",
    "TrackingConfig",
    "TrainConfig",
    "TrainSourceConfig",
    "dump",
    "for_evaluation",
    "load",
    "resolve",
]
