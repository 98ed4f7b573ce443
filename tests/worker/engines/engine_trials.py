"""Runs trials one after another in one process: the folder and the overrides of each, as JSON, are its arguments; what
they said goes to FOLDER/NUMBER.jsonl."""

import json
import os
import sys
from pathlib import Path


def main() -> None:
    os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    from hydra import compose, initialize_config_dir

    from lora_lab.composition.compose import CONF, load, register_schema
    from lora_lab.events import Event, encode
    from lora_lab.worker.trial import run_trial

    folder, trials = Path(sys.argv[1]), json.loads(sys.argv[2])
    register_schema()
    with initialize_config_dir(str(CONF), version_base=None):
        configs = [load(compose("config", overrides=overrides)) for overrides in trials]
    for number, config in enumerate(configs):
        with (folder / f"{number}.jsonl").open("w") as file:

            def emit(event: Event) -> None:
                file.write(encode(event) + "\n")

            run_trial(config, folder / str(number), emit)


if __name__ == "__main__":
    main()
