"""Find optimizers that cannot run as asked, and what they cannot be combined with."""

from lora_lab.config import TrialConfig
from lora_lab.method_config import OptimizerConfig
from lora_lab.options import DType, EngineKind, MethodKind

_PRESETS = {"galore": "galore", "apollo": "apollo", "lomo": "lomo", "adalomo": "adalomo"}
"""Optimizers that lora_lab brings itself, by how transformers' names for them begin."""

_DEFAULTS = OptimizerConfig()


def optimizer_faults(config: TrialConfig) -> list[str]:
    """Return what is wrong with a trial's optimizer, one sentence each."""
    fault = _name_fault(config.optimizer)
    if fault:
        return [fault]
    return [*_projection_faults(config), *_in_backward_faults(config)]


def _name_fault(optimizer: OptimizerConfig) -> str:
    if optimizer.optim and optimizer.target:
        return (
            f"optimizer.optim={optimizer.optim} and optimizer.target={optimizer.target} are both set; "
            "give one: add optimizer.optim=null to use the target."
        )
    if not optimizer.optim and not optimizer.target:
        return "neither optimizer.optim nor optimizer.target is set; choose an option, for example optimizer=adamw."
    if optimizer.target and "." not in optimizer.target:
        return f"optimizer.target={optimizer.target} is not an import path; write for example torch.optim.SGD."
    if optimizer.optim and optimizer.args:
        return "optimizer.args goes with optimizer.target only; transformers sets the arguments of a named optim."
    preset = next((each for name, each in _PRESETS.items() if (optimizer.optim or "").startswith(name)), None)
    if preset:
        return (
            f"optimizer.optim={optimizer.optim} is transformers' name for a package that is not used here. Use "
            f"optimizer={preset}."
        )
    return ""


def _projection_faults(config: TrialConfig) -> list[str]:
    optimizer = config.optimizer
    if optimizer.projection is None:
        return [
            f"optimizer.{name}={getattr(optimizer, name)} has no effect without optimizer.projection. Leave it out, or "
            "use optimizer=galore."
            for name in ("projection_rank", "projection_steps")
            if getattr(optimizer, name) != getattr(_DEFAULTS, name)
        ]
    what, found = f"optimizer.projection={optimizer.projection.name}", []
    if config.method.kind is not MethodKind.full:
        found.append(
            f"{what} projects gradients of whole layers to a low rank, which those of adapters have already. Use "
            "method=full, or optimizer=adamw_fused."
        )
    if config.precision.dtype is DType.fp16:
        found.append(f"{what} with precision=fp16: gradients that overflow would be projected. Use precision=bf16.")
    if config.placement.world_size > 1:
        found.append(f"{what} with placement=ddp: each worker would choose a projection. Use placement=one.")
    return found


def _in_backward_faults(config: TrialConfig) -> list[str]:
    if not config.optimizer.in_backward:
        return []
    what, found = "optimizer.in_backward=true updates each weight within the backward", []
    if config.max_grad_norm > 0:
        found.append(
            f"{what}, and max_grad_norm={config.max_grad_norm:g} needs the norm of all gradients before the first "
            "update. Add max_grad_norm=0."
        )
    if config.grad_accum_steps > 1:
        found.append(
            f"{what}, so gradients of grad_accum_steps={config.grad_accum_steps} micro-batches cannot be added up. Use "
            "grad_accum_steps=1 and a larger batch_size."
        )
    if config.precision.dtype is DType.fp16:
        found.append(
            f"{what}, and precision=fp16 looks for overflows in all gradients before. Use precision=bf16 or fp32."
        )
    if config.placement.world_size > 1:
        found.append(f"{what}, before workers could exchange gradients. Use placement=one.")
    if config.engine.kind is EngineKind.graph:
        found.append(f"{what}, and engine=graph hands all gradients on at once. Use engine=compile or engine=eager.")
    return found
