"""What fit says to type: typed after the user's own words, it gives the trial that was judged."""

import pytest

from lora_lab.composition.once import compose_once
from lora_lab.fit.__main__ import main
from lora_lab.fit.advice import advise
from lora_lab.fit.estimate import GIB, TOO_LARGE, estimate
from lora_lab.fit.shapes import shapes_of


@pytest.mark.parametrize(
    ("typed", "gib", "among"),
    [
        pytest.param(
            *(("model=llama3_1_8b", "method=rslora", "batch_size=2", "seq_len=512"), 12, "method=qlora"),
            marks=pytest.mark.nightly,
        ),
        (("model=smollm2_135m", "engine=graph", "engine.chunked_loss=false", "seq_len=2048"), 2.4, "engine=liger"),
    ],
    ids=["rslora", "whole logits"],
)
def test_advice_typed_after_the_users_words_is_the_trial_that_was_judged(
    typed: tuple[str, ...], gib: float, among: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = compose_once(typed)
    assert estimate(config, shapes_of(config.model)).verdict(gib * GIB) == TOO_LARGE
    changes = advise(config, shapes_of(config.model), gib * GIB)
    words = " ".join(change.override for change in changes).split()
    assert any(word.startswith(among) for word in words), words
    assert compose_once([*typed, *words]) == changes[-1].config
    assert main(["--vram", str(gib), *typed, *words]) == 0
    capsys.readouterr()
