"""What goes wrong on a real card ends its own trial and no other, and the card is free again afterwards."""

import json
import os
from pathlib import Path

import pytest
from conftest import lab_in, records_in

SABOTEUR = Path(__file__).parents[1] / "fakes" / "saboteur"
HARM = {
    "0.0002": ("poison", "after step 2", "failed"),
    "0.0003": ("kill", "after step 2", "killed"),
    "0.0004": ("hang", "after step 2", "timed_out"),
    "0.0005": ("huge tensor on the card", "after step 2", "out_of_memory"),
}
SLACK_GIB = 0.07
"""What trial/device_lock.py allows a card to vary by."""


@pytest.mark.gpu
def test_a_poisoned_context_a_kill_a_hang_and_no_memory_end_one_trial_each(tmp_path: Path) -> None:
    plan = tmp_path / "sabotage.json"
    plan.write_text(json.dumps({rate: [act, where] for rate, (act, where, _) in HARM.items()}))
    # shared, since tests before this one may have left a context of this process on the card
    short = (
        "model=tiny",
        "measure=quick",
        "seq_len=64",
        "timeout_minutes=0.4",
        "cooldown_celsius=95",
        "share_device=true",
    )
    rates = ",".join(["0.0001", *HARM, "0.0006"])
    said = lab_in(tmp_path, real=True)(
        "-m",
        *short,
        f"learning_rate={rates}",
        PYTHONPATH=f"{SABOTEUR}:{os.environ.get('PYTHONPATH', '')}",
        SABOTAGE=str(plan),
    )
    assert said.code == 1, said.text
    records = {record["params"]["learning_rate"]: record for record in records_in(tmp_path)}
    outcomes = {rate: record["outcome"] for rate, record in records.items()}
    assert outcomes == {"0.0001": "finished", "0.0006": "finished"} | {rate: end for rate, (*_, end) in HARM.items()}
    assert "assert" in records["0.0002"]["tags"]["reason"], records["0.0002"]["tags"]["reason"]
    assert records["0.0005"]["metrics"]["out_of_memory/asked_gib"] == pytest.approx(4 * 10**13 / 2**30, rel=1e-3)
    for record in records.values():
        held = record["metrics"]["card/used_after_gib"] - record["metrics"]["card/used_before_gib"]
        assert held < SLACK_GIB, (record["name"], held)
        assert "card/start_celsius" in record["metrics"]
