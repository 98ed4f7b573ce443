"""Points as medians over their trials, and which of them nothing beats."""

from hypothesis import given
from hypothesis import strategies as st
from planted import trial

from lora_lab.report.answers.pareto import Point, front, points
from lora_lab.report.measures import ENERGY, LOSS, THROUGHPUT, VRAM
from lora_lab.report.statistics.factors import design


def point(throughput, energy, name="p"):
    told = {"throughput": throughput, "energy": energy}
    figures = {key: (value, value, value) for key, value in told.items() if value is not None}
    return Point(levels={"factor": name}, trials=(), figures=figures, outcomes={}, regime="GPU-bound")


def test_points_are_medians_with_what_they_span():
    speeds = {"adamw": [90.0, 100.0, 170.0], "paged_adamw": [80.0, 82.0]}
    trials = [
        trial({THROUGHPUT.key: speed, ENERGY.key: 10 / speed}, optimizer=optimizer, repeat=repeat)
        for optimizer, told in speeds.items()
        for repeat, speed in enumerate(told)
    ]
    first, second = points(trials[::-1], trials, design(trials).factors)
    assert first.levels == {"optimizer": "adamw"}
    assert first.figures["throughput"] == (100.0, 90.0, 170.0)
    assert first.figures["energy"] == (0.1, 10 / 170, 10 / 90)
    assert second.figures["throughput"] == (81.0, 80.0, 82.0)
    assert set(first.figures) == {"throughput", "energy"}
    assert first.outcomes == {"finished": 3}


def test_outcomes_are_of_all_trials_and_figures_of_the_measured():
    good = trial({THROUGHPUT.key: 100.0}, batch_size="1")
    bad = trial({THROUGHPUT.key: 5.0}, batch_size="1", validity="invalid", regime="host-bound")
    out = [trial({VRAM.key: 7.0}, batch_size=batch, outcome="out_of_memory", regime=None) for batch in "12"]
    trials = [out[1], bad, out[0], good]
    small, large = points(trials, [good], design(trials).factors)
    assert (small.label, large.label) == ("1x512", "2x512")
    assert small.outcomes == {"finished": 2, "out_of_memory": 1}
    assert small.figures == {"throughput": (100.0, 100.0, 100.0)}
    assert small.regime == "GPU-bound"
    assert (large.outcomes, large.figures, large.regime) == ({"out_of_memory": 1}, {}, "not known")


def test_regimes_that_disagree_are_mixed():
    def regime(*told):
        trials = [trial({THROUGHPUT.key: 1.0}, regime=each) for each in told]
        (only,) = points(trials, trials, ())
        assert only.label == "the only point"
        return only.regime

    assert regime("host-bound", "host-bound") == "host-bound"
    assert regime("host-bound", "GPU-bound") == "mixed"
    assert regime("host-bound", None) == "host-bound"
    assert regime(None) == "not known"


def test_loss_of_random_weights_is_no_figure():
    trials = [trial({LOSS.key: 2.0}, model__weights=weights) for weights in ("random", "pretrained")]
    told = {found.label: found.figures for found in points(trials, trials, design(trials).factors)}
    assert told == {"weights=random": {}, "weights=pretrained": {"loss": (2.0, 2.0, 2.0)}}


def test_figures_that_are_no_numbers_are_in_no_median():
    trials = [trial({LOSS.key: float("nan")}), trial({LOSS.key: 2.0})]
    assert points(trials, trials, ())[0].figures == {"loss": (2.0, 2.0, 2.0)}


def test_a_front_goes_from_the_fastest_on():
    fast, lean, beaten = point(100.0, 0.2, "fast"), point(50.0, 0.1, "lean"), point(50.0, 0.2, "beaten")
    assert front([beaten, lean, fast], THROUGHPUT, ENERGY) == [fast, lean]
    assert front([beaten, lean, fast], ENERGY, THROUGHPUT) == [lean, fast]


def test_points_without_one_of_the_figures_are_left_out():
    assert front([point(100.0, None), point(None, 0.1)], THROUGHPUT, ENERGY) == []


some = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), max_size=12)


@given(some, st.randoms(use_true_random=False))
def test_nothing_on_the_front_is_beaten_and_everything_off_it_is(figures, chance):
    candidates = [point(float(speed), float(joules), f"{at:02}") for at, (speed, joules) in enumerate(figures)]
    kept = front(candidates, THROUGHPUT, ENERGY)

    def beats(one, other):
        faster = one.figures["throughput"][0] - other.figures["throughput"][0]
        leaner = other.figures["energy"][0] - one.figures["energy"][0]
        return min(faster, leaner) >= 0 and max(faster, leaner) > 0

    assert not any(beats(rival, on) for on in kept for rival in candidates)
    assert all(any(beats(on, off) for on in kept) for off in candidates if off not in kept)
    chance.shuffle(candidates)
    assert front(candidates, THROUGHPUT, ENERGY) == kept
