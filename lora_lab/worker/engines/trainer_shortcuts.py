"""Cache what Trainer asks the model in every step, so that it does not walk through all modules.

With Qwen2.5-1.5B's 2,333 modules Trainer's own work is most of a short step. The shortcuts hold while training runs, on
this one model and not on its class.
"""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_lab.worker.trainables.trainable import trained_parameters


class TrainerShortcuts(TrainerCallback):
    """Installs the shortcuts when training begins, when the optimizer has its parameters; removes them at the end."""

    _NAMES = ("num_parameters", "train", "zero_grad", "parameters")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Install the shortcuts."""
        trained = trained_parameters(model)
        counts: dict[Any, int] = {}
        count, train = model.num_parameters, model.train

        def num_parameters(*args: Any, **kwargs: Any) -> int:
            key = (args, tuple(kwargs.items()))
            if key not in counts:
                counts[key] = count(*args, **kwargs)
            return counts[key]

        def train_mode(mode: bool = True) -> Any:
            return model if model.training == mode else train(mode)

        def zero_grad(*_: Any, **__: Any) -> None:
            for parameter in trained:
                parameter.grad = None

        def parameters(*_: Any, **__: Any) -> Any:
            return iter(trained)  # for clipping: the frozen ones have no gradient

        model.num_parameters, model.train = num_parameters, train_mode
        model.zero_grad, model.parameters = zero_grad, parameters

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Remove the shortcuts."""
        for name in self._NAMES:
            model.__dict__.pop(name, None)
