"""Answer for a card that the trials did not run on: memory carries over, neither speed nor order does."""

from collections.abc import Sequence
from dataclasses import replace

from lora_lab.report.answers.best.candidates import Wish
from lora_lab.report.answers.best.choice import Choice, choose
from lora_lab.report.answers.best.cohort import subjects
from lora_lab.report.measures import VRAM
from lora_lab.report.writing.labels import count
from lora_lab.store.trials import Trial

RESERVE = 0.05
"""The share of the card's memory that is left free, because a driver, a desktop and another version of torch need a
little more or less than the measured card's."""


def usable(card_gib: float) -> float:
    """Return how much memory of a card a configuration may take, in GiB."""
    return card_gib * (1 - RESERVE)


def choose_for_another_card(trials: Sequence[Trial], wish: Wish) -> Choice:
    """Choose the best configuration of the largest model that fits the card, or of the named model.

    Args:
        trials: measured on one kind of card.
        wish: its `vram_gib` is all of the card's memory; the reserve is taken off here.

    Raises: InvalidInput when the measurements cannot answer the question."""
    if wish.vram_gib is not None:
        wish = replace(wish, vram_gib=usable(wish.vram_gib))
    if wish.model is not None:
        return _about_another_card(choose(trials, wish))
    models = largest_first(trials)
    made = [choose(trials, replace(wish, model=model)) for model in models]
    chosen = next((choice for choice in made if choice.best is not None), made[-1])
    rest = [
        f"{count(len(choice.subject.measured), 'trial')} of model={model}: --model {model}"
        for model, choice in zip(models, made, strict=True)
        if choice is not chosen
    ]
    return _about_another_card(replace(chosen, others=tuple(rest), is_largest_model=chosen.best is not None))


def _about_another_card(choice: Choice) -> Choice:
    """Return the choice with the doubt and the remarks that another card leaves."""
    if choice.best is None:
        return replace(choice, another_card=True)
    device = choice.subject.place.device
    repeats = count(len(choice.best.trials), "trial")
    order = "speed does not" if choice.wish.objective is VRAM else "neither the speed nor this order does"
    sure = (
        f"{repeats} on an {device} with random weights. Memory carries over to your card, {order}. To measure all "
        "there within minutes, add model.weights=random data=random_tokens"
    )
    return replace(choice, another_card=True, sure=sure, remarks=())


def largest_first(trials: Sequence[Trial]) -> list[str]:
    """Return the models with measured trials, the one with most weights in its layers first."""
    sizes = {subject.model: _layers_size(subject.trials[0]) for subject in subjects(trials)}
    return sorted(sizes, key=lambda model: -sizes[model])


def _layers_size(trial: Trial) -> int:
    """Return a number that grows with the weights of a model's layers."""
    keys = ("num_hidden_layers", "hidden_size", "intermediate_size")
    layers, hidden, inner = (int(trial.params.get(f"model.architecture.{key}", "0")) for key in keys)
    return layers * hidden * (hidden + inner)
