"""What benchmarks.overhead compares with: a plain Hydra application that starts a fresh interpreter for each trial.

    python -m benchmarks.plain_hydra -m key=value,value ...

The same worker code trains in it, so only the way there differs. Each job leaves asked.json and events.jsonl.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from lora_lab.composition.compose import CONF, load, register_schema
from lora_lab.events import Event, encode
from lora_lab.trial.devices import choose_placement, worker_environment


def job(composed: DictConfig) -> None:
    folder = Path(HydraConfig.get().runtime.output_dir)
    (folder / "asked.json").write_text(json.dumps({"t": time.monotonic()}), encoding="utf-8")
    environment = {**os.environ, **worker_environment(choose_placement(load(composed).device))}
    overrides = list(HydraConfig.get().overrides.task)
    subprocess.run(
        [sys.executable, "-m", "benchmarks.plain_hydra", "--trial", str(folder), *overrides],
        env=environment,
        check=True,
        capture_output=True,
    )


def trial(folder: Path, overrides: list[str]) -> None:
    from lora_lab.worker.trial import run_trial

    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = load(hydra.compose("config", overrides=overrides))
    with (folder / "events.jsonl").open("w", encoding="utf-8", buffering=1) as journal:

        def emit(event: Event) -> None:
            journal.write(encode(event) + "\n")

        run_trial(config, folder, emit)


if __name__ == "__main__":
    register_schema()
    if sys.argv[1] == "--trial":
        trial(Path(sys.argv[2]), sys.argv[3:])
    else:
        sys.argv.append("hydra/sweeper=basic")
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(job)()
