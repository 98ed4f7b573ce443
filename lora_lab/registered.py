"""Load a registered model: mlflow.pyfunc.load_model("models:/NAME/1") calls this module by its name."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lab.base_weights import trained_in
from lora_lab.composition.compose import stored_config
from lora_lab.config import InvalidInput
from lora_lab.dataset.row import Role, Turn, as_conversations
from lora_lab.store.trained import CONFIG

if TYPE_CHECKING:
    from lora_lab.worker.answers import Answerer


class Registered:
    """A tuned model that answers questions, each in a conversation of its own."""

    def __init__(self, answerer: "Answerer") -> None:
        self._answerer = answerer

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> list[str]:
        """Return the answers, always by the likeliest token.

        Args:
            model_input: a table whose one column holds the questions: what MLflow makes of a text or a list of texts.
            params: `max_new_tokens`, the most tokens of an answer.

        Raises: InvalidInput when a question is longer than the model reads."""
        most = int((params or {})["max_new_tokens"])
        return [self._answer(str(question), most) for question in model_input.iloc[:, 0]]

    def _answer(self, question: str, most: int) -> str:
        asked = [Turn(Role.user, question)]
        room = self._answerer.room(asked)
        if room is not None and room < 1:
            raise InvalidInput(f"a question is {1 - room} tokens longer than the model reads. Shorten it.")
        return self._answerer.answer(asked, tuned=True, most_tokens=most if room is None else min(most, room)).text


def _load_pyfunc(folder: str, settings: dict[str, Any]) -> Registered:
    """Load what a trial has trained. MLflow gives this function its name."""
    config, trained = stored_config(Path(folder) / CONFIG), trained_in(Path(folder))
    if trained is None:
        raise InvalidInput(f"{folder} holds nothing that was trained.")
    from lora_lab.worker.answers import Answerer  # it imports torch

    kinds = str(settings["rows"]).replace("unknown", "")
    return Registered(Answerer(config, trained, as_conversations(config.data.layout, kinds)))
