"""Plant square waves of load on the card, and compare what its energy counter and its power sensors say of them.

    python -m benchmarks.square_wave OUT [--seconds 5] [--repeats 2] [--periods 40,70,...] [--duties 0.25,0.5,0.75]

A wave is matrix products for a part of each period (its duty), then nothing. Each repeat has all waves, constant load
and rest, in random order. The sensors are read by the product's own sampler. The energy bound of a trial rests on two
assumptions, and both are tested here: the counter sees all the time, and it is published at once.

**Expected energy** is seconds x (duty x P(constant) + (1 - duty) x P(rest)); duty is measured with CUDA events, both
powers by the counter in this session. That is an assumption too: power needs time to rise and fall, clocks may change,
and a cooler card draws less. The matrices hold ones, which draw less than random numbers do, so that the power limit
leaves the clocks alone; the table says for which share of the time it did not.

**Off the line**: what a rise and a fall cost grows with their number, so with 1/period. What a sensor misses that
looks only now and then does not: it appears at periods near its own tick or half of it, and changes from repeat to
repeat. So each ratio is compared with the straight line over 1/period of its duty, and with its other repeats.

**Swing**: the 95th less the 5th percentile of the counter's joules per tick, over (P(constant) - P(rest)) x the median
tick. Where the ticks are even, a counter that sees all the time swings by the figure `if complete` at most: by 0 where
a tick holds whole periods. **Late**: the delay at which the load before each tick explains its joules best.
Every reading is stored too, in square_wave_readings.json.gz: `rows(*read_readings(PATH))` makes all figures again.
"""

import argparse
import gzip
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.reports import provenance, write_report
from benchmarks.square_figures import SENSORS, Planted, Wave, by_period, page, rows
from lora_lab.store.environment import device_facts, environment
from lora_lab.telemetry.sampler import Sample, Sampler
from lora_lab.telemetry.sensors import read_cards
from lora_lab.trial.devices import choose_placement, worker_environment

BEFORE_SECONDS, AFTER_SECONDS = 1.1, 0.7
"""A wave goes on for this long outside its window: the driver's average is of one second."""
PRODUCT_SECONDS = 0.002

Busy = Callable[[float], float]
"""Keep the card busy for about that many seconds, and return for how many it was."""


def waves(periods: Sequence[float], duties: Sequence[float], repeats: int, seed: int) -> list[Wave]:
    """Return every wave, constant load and rest once per repeat, each repeat in its own random order."""
    longest, order = max(periods), random.Random(seed)
    kinds = [(longest, 0.0), (longest, 1.0), *((period, duty) for period in periods for duty in duties)]
    return [Wave(*kind, repeat) for repeat in range(repeats) for kind in order.sample(kinds, len(kinds))]


def plant(wave: Wave, seconds: float, busy: Busy, before: float, after: float) -> Planted:
    """Run a wave for `seconds`, and for `before` and `after` on either side of these."""
    first = math.ceil(before / wave.period)
    last = first + math.ceil(seconds / wave.period)
    dues, loads = [time.monotonic()], []
    for _ in range(last + math.ceil(after / wave.period)):
        begin = time.monotonic()
        loads.append((begin, busy(wave.duty * wave.period) if wave.duty else 0.0))
        now = time.monotonic()
        dues.append(max(dues[-1] + wave.period, now))
        time.sleep(dues[-1] - now)
    return Planted(wave, dues[first], dues[last], loads)


def write_readings(path: Path, planted: Sequence[Planted], samples: Sequence[Sample]) -> None:
    """Store all that the figures follow from."""
    content = {"planted": [asdict(each) for each in planted], "samples": [sample.encode() for sample in samples]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(json.dumps(content).encode(), mtime=0))


def read_readings(path: Path) -> tuple[list[Planted], list[Sample]]:
    """Return what `write_readings` stored."""
    content = json.loads(gzip.decompress(path.read_bytes()))
    planted = [Planted(**{**each, "wave": Wave(**each["wave"])}) for each in content["planted"]]
    return planted, [Sample.decode(line) for line in content["samples"]]


def cuda_products() -> Busy:
    """Return a load of matrix products, the largest that take no more than PRODUCT_SECONDS each."""
    import torch  # only now, as main sets the variables that show it one card

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    side = 16384
    one = math.inf
    while one > PRODUCT_SECONDS and side > 512:
        side //= 2
        ones, out = torch.ones(2, side, side, dtype=torch.float16, device="cuda").unbind()

        def products(count: int, ones: torch.Tensor = ones, out: torch.Tensor = out) -> float:
            begin.record()
            for _ in range(count):
                torch.mm(ones, ones, out=out)
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1e3

        products(3)
        one = products(10) / 10
    count = math.ceil(1.0 / one)
    one = products(count) / count  # at the clocks of a card at work
    return lambda seconds: products(max(1, round(seconds / one)))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.square_wave", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--seconds", type=float, default=5.0, help="the window of each wave")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--periods", type=_numbers, default=_numbers("40,70,100,150,250,400"), help="milliseconds")
    parser.add_argument("--duties", type=_numbers, default=_numbers("0.25,0.5,0.75"), help="between 0 and 1")
    parser.add_argument("--seed", type=int, default=0, help="of the order")
    asked = parser.parse_args()
    placement = choose_placement("auto")
    if not placement.cards:
        raise SystemExit("square_wave measures an NVIDIA card, and there is none.")
    os.environ.update(worker_environment(placement))  # as a worker has it, before torch is imported
    planned = waves([period / 1e3 for period in asked.periods], asked.duties, asked.repeats, asked.seed)
    busy = cuda_products()
    with Sampler(lambda slow: read_cards(placement.cards, slow)) as sampler:
        planted = [plant(wave, asked.seconds, busy, BEFORE_SECONDS, AFTER_SECONDS) for wave in planned]
    write_readings(asked.out / "square_wave_readings.json.gz", planted, sampler.samples)
    seen = rows(planted, sampler.samples)
    command = " ".join(["python -m benchmarks.square_wave OUT", *sys.argv[2:]])
    origin = provenance(environment() | device_facts(placement), command) | {"date": f"{datetime.now(UTC):%Y-%m-%d}"}
    content = {"by_period": [row for sensor in SENSORS for row in by_period(seen, sensor)], "waves": seen}
    write_report(asked.out, "square_wave", "What the sensors say of square waves", origin, page(seen), content)
    print(page(seen))


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
