"""Train VeRA: two vectors a layer around a pair of frozen random matrices that all layers share (arXiv 2310.11454)."""

from collections.abc import Sequence
from typing import Any

from peft import VeraConfig

from lora_lab.config import InvalidInput
from lora_lab.worker.trainables.lora import Lora


class Vera(Lora):
    """Trains PEFT's VeRA in fp32. The random matrices are saved with the vectors, and drawn with the trial's seed."""

    def adapters(self, model: Any, leave_out: Sequence[str] = ()) -> VeraConfig:
        """Make PEFT's config.

        Raises: InvalidInput for modules that would have to be left out."""
        method = self._method
        if leave_out:
            raise InvalidInput(
                f"method=vera: text never runs through {', '.join(leave_out)}, and PEFT's VeRA can leave no module "
                "out. Name others: method.target_modules=[q_proj,k_proj,v_proj,o_proj]. Or use method=lora."
            )
        return VeraConfig(
            task_type="CAUSAL_LM",
            r=method.rank,
            vera_dropout=method.dropout,
            projection_prng_key=self._seed,
            target_modules=self._targets(),
        )
