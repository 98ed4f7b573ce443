"""Take the steps. The engine and the telemetry enter the phases: compilation, warm_up, window, profile; in a job also
evaluation and checkpoint."""

from lora_lab.worker.shared_step import check_equal
from lora_lab.worker.stages.stage import Stage, TrialContext


def _train(trial: TrialContext) -> None:
    trial.model.train()
    trial.train()
    if trial.group.is_shared:
        check_equal(trial.group, trial.model, "after training")
    # Trainer leaves an autocast wrapper on forward that would turn whole logits to fp32
    trial.trainer.accelerator.unwrap_model(trial.model, keep_fp32_wrapper=False)


STAGE = Stage(None, _train)
