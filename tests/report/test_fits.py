"""The largest shape that fits a budget, and what the next one needed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted import trial

from lora_lab.report.answers.fits import fits
from lora_lab.report.statistics.factors import design


def ran(peak_gib, *, limit_gib=None, used_gib=None, before_gib=0.5, **more):
    """A trial that finished; `used_gib` is its peak less what the allocator kept without using it."""
    used = peak_gib if used_gib is None else used_gib
    metrics = {
        "vram/peak_device_gib": peak_gib,
        "vram/peak_reserved_gib": peak_gib - 1.0,
        "vram/peak_allocated_gib": used - 1.0,
        "card/used_before_gib": before_gib,
    }
    return trial(metrics, vram_limit_gib=str(limit_gib), tags={"device.memory_gib": "79.6"}, **more)


def ran_out(held_gib, asked_gib=None, *, limit_gib=None, card_gib="79.6", **more):
    """A trial that did not."""
    metrics = {"vram/peak_reserved_gib": held_gib}
    metrics |= {} if asked_gib is None else {"out_of_memory/asked_gib": asked_gib}
    tags = {"device.memory_gib": card_gib}
    return trial(metrics, outcome="out_of_memory", vram_limit_gib=str(limit_gib), tags=tags, validity="unknown", **more)


def of(trials, *budgets):
    return fits(trials, design(trials).factors, budgets)


def one(trials, budget):
    (fit,) = of(trials, budget)
    return fit


def test_by_the_cards_peak():
    trials = [ran(5.0, batch_size="1"), ran(7.5, batch_size="2"), ran(12.5, batch_size="4")]
    small, middle, exact, large = of(trials, 4, 8, 7.5, 24)
    assert (small.largest, small.next, small.next_needs_gib) == (None, "1x512", 5.0)
    assert (middle.largest, middle.largest_gib, middle.next, middle.next_needs_gib) == ("2x512", 7.5, "4x512", 12.5)
    assert middle.trial is trials[1]
    assert exact.largest == "2x512"
    assert (large.largest, large.next, large.next_needs_gib) == ("4x512", None, None)
    assert not any(fit.next_is_bound for fit in (small, middle, exact, large))


def test_one_shape_for_all():
    fit = one([ran(5.0)], 6)
    assert (fit.largest, fit.others) == ("1x512", "")


def test_each_combination_of_the_other_factors_by_itself():
    trials = [
        ran(5.0 + extra, optimizer=optimizer, batch_size=batch)
        for optimizer, extra in (("adamw", 2.0), ("paged_adamw", 0.0))
        for batch in "12"
    ]
    assert [(fit.others, fit.largest) for fit in of(trials, 6)] == [("adamw", None), ("paged_adamw", "2x512")]


def test_settings_tied_to_the_shape_are_told_apart_from_it():
    trials = [ran(5.0, optimizer="adamw", batch_size="1"), ran(7.0, optimizer="paged_adamw", batch_size="2")]
    assert [(fit.others, fit.largest) for fit in of(trials, 8)] == [("adamw", "1x512"), ("paged_adamw", "2x512")]


def test_out_of_memory_says_at_least_how_much():
    fit = one([ran(7.0, batch_size="1"), ran_out(6.5, 2.25, limit_gib=8.0, batch_size="2")], 8)
    assert (fit.largest, fit.next, fit.next_needs_gib, fit.next_is_bound) == ("1x512", "2x512", 8.75, True)


def test_out_of_memory_is_never_less_than_the_limit():
    fit = one([ran_out(5.0, 0.5, limit_gib=8.0)], 8)
    assert (fit.largest, fit.next_needs_gib, fit.next_is_bound) == (None, 8.0, True)


def test_out_of_memory_on_the_whole_card():
    assert one([ran_out(7.0, card_gib="8.0")], 8).next_needs_gib == 8.0
    assert one([ran_out(7.0, card_gib="8.0")], 6).next == "1x512"


def test_what_a_larger_budget_would_do_is_not_known():
    small, large = of([ran(7.0, batch_size="1"), ran_out(7.0, 2.0, limit_gib=8.0, batch_size="2")], 8, 24)
    assert (small.next, small.unknown) == ("2x512", ())
    assert (large.largest, large.next, large.unknown) == ("1x512", None, ("2x512",))
    assert of([ran_out(7.0, 2.0, limit_gib=8.0)], 24) == []


def test_what_it_asked_for_may_be_more_than_a_larger_budget():
    assert one([ran_out(7.0, 20.0, limit_gib=8.0)], 24).next_needs_gib == 27.0


def test_where_it_ran_on_a_larger_card_its_need_is_measured():
    fit = one([ran(9.0, batch_size="2"), ran_out(6.0, 2.25, limit_gib=8.0, batch_size="2")], 8)
    assert (fit.next, fit.next_needs_gib, fit.next_is_bound) == ("2x512", 9.0, False)


def test_the_limit_held_though_the_cards_peak_lies_above_it():
    tight, same, larger = of([ran(8.3, limit_gib=8.0, before_gib=0.5)], 6, 8, 10)
    assert tight.largest is None
    assert same.largest == larger.largest == "1x512"
    assert same.largest_gib == 8.3
    assert "before the trial" in same.note
    assert larger.note == ""


def test_within_the_limit_counts_more_than_a_peak_with_more_at_hand():
    runs = one([ran(9.0), ran(8.0, limit_gib=8.0)], 8)
    assert runs.largest == "1x512"
    assert "yet ran within 8 GiB" in runs.note
    fails = one([ran(7.5), ran_out(7.0, 0.75, limit_gib=8.0)], 8)
    assert (fails.largest, fails.next) == (None, "1x512")
    assert "yet ran out of 8 GiB" in fails.note


def test_of_repeats_the_worst_counts():
    fit = one([ran(7.9, repeat=0), ran(8.1, repeat=1), ran(7.8, repeat=2)], 8)
    assert (fit.largest, fit.next_needs_gib) == (None, 8.1)
    fit = one([ran(7.7, repeat=0, limit_gib=8.0), ran_out(7.5, 0.6, repeat=1, limit_gib=8.0)], 8)
    assert fit.largest is None
    assert "one trial ran within 8 GiB and another ran out" in fit.note


def test_a_peak_that_the_allocator_may_give_back_is_told_of():
    fit = one([ran(9.4, used_gib=7.3)], 8)
    assert fit.next_may_fit
    assert "was not tried" in fit.note
    assert not one([ran(9.4, used_gib=8.3)], 8).next_may_fit
    assert not one([ran(9.4, used_gib=7.3), ran_out(7.0, 1.2, limit_gib=8.0)], 8).next_may_fit


def test_without_the_cards_reading_torchs_share_is_taken_and_told_of():
    fit = one([trial({"vram/peak_reserved_gib": 5.0})], 6)
    assert fit.largest_gib == 5.0
    assert "the card's memory use was not read" in fit.note


def test_accumulated_steps_are_no_larger_than_their_micro_batches():
    trials = [ran(6.0, batch_size="1", grad_accum_steps="8"), ran(9.0, batch_size="4", grad_accum_steps="1")]
    fit = one(trials, 8)
    assert (fit.largest, fit.next) == ("1x8x512", "4x1x512")


@pytest.mark.parametrize(
    "mute",
    [
        trial({"throughput/tokens_per_second": 5.0}, tags={"device.cpu": "some CPU"}),
        trial({"vram/peak_device_gib": 5.0}, tags={"device.cpu": "some CPU"}),
        trial({"vram/peak_device_gib": 5.0}, validity="invalid"),
        trial({"vram/peak_device_gib": 5.0}, outcome="diverged"),
        trial(outcome="out_of_memory"),
    ],
)
def test_trials_that_say_nothing_of_memory(mute):
    assert of([mute], 8) == []


@st.composite
def planted_needs(draw):
    """Shapes with known needs, each tried on the whole card or within limits, or both."""
    trials, needs = [], {}
    for batch in draw(st.lists(st.sampled_from("1248"), min_size=1, unique=True)):
        need = needs[f"{batch}x512"] = draw(st.integers(8, 120)) / 4
        for limit in draw(st.lists(st.sampled_from([None, 6.0, 8.0, 12.0, 24.0]), min_size=1, max_size=3)):
            if limit is None or need <= limit:
                trials.append(ran(need, limit_gib=limit, batch_size=batch))
            else:
                held = limit * draw(st.floats(0.3, 1.0))
                trials.append(ran_out(held, (need - held) * draw(st.floats(0, 1)), limit_gib=limit, batch_size=batch))
    return needs, trials


@given(planted_needs(), st.sampled_from([6, 8, 10, 12, 16, 24]), st.randoms(use_true_random=False))
def test_verdicts_agree_with_what_was_planted(planted, budget, chance):
    needs, trials = planted
    told = of(trials, budget)
    for fit in told:
        known = {shape: gib for shape, gib in needs.items() if shape not in fit.unknown}
        fitting = [shape for shape, gib in known.items() if gib <= budget]
        assert fit.largest == max(fitting, key=lambda shape: int(shape[0]), default=None)
        larger = [shape for shape in known if shape not in fitting and (not fit.largest or shape > fit.largest)]
        assert fit.next == min(larger, default=None)
        if fit.next is not None and fit.next_is_bound:
            assert budget <= fit.next_needs_gib <= needs[fit.next] + 1e-9
        elif fit.next is not None:
            assert fit.next_needs_gib == needs[fit.next]
    chance.shuffle(trials)
    assert [(fit.largest, fit.next, fit.next_needs_gib) for fit in of(trials, budget)] == [
        (fit.largest, fit.next, fit.next_needs_gib) for fit in told
    ]
