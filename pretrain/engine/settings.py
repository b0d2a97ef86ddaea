"""What DeepSpeed is told. A pure function of the plan; nothing is 'auto' and DeepSpeed schedules nothing itself."""

from typing import Any

from pretrain.config import Plan

BUCKET_ELEMENTS = 50_000_000
"""Elements per reduction or gather; at 2 bytes each, 100 MB a bucket."""


def deepspeed_config(plan: Plan) -> dict[str, Any]:
    """The configuration dictionary of `deepspeed.initialize` and `deepspeed.zero.Init`.

    The learning rate is set by us before each step. Gradients accumulate and are reduced in fp32. At stage 0 the
    norm and the clipping are ours (`Engine.step`), because DeepSpeed neither reports nor checks that norm there.
    """
    bf16 = plan.precision == "bf16"
    config: dict[str, Any] = {
        "train_batch_size": plan.micro_batch * plan.accumulation * plan.world_size,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": 0.0 if plan.zero_stage == 0 else plan.clip_grad_norm or 0.0,
        "steps_per_print": 2**31,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16},
        "zero_optimization": _zero(plan),
    }
    if bf16:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"
    if plan.precision == "bf16_autocast":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return config


def _zero(plan: Plan) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": plan.zero_stage}
    if plan.zero_stage > 0:
        zero |= {
            "overlap_comm": plan.device == "cuda",
            "contiguous_gradients": True,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
        }
    if plan.zero_stage == 3:
        zero |= {"stage3_prefetch_bucket_size": BUCKET_ELEMENTS}
    return zero
