"""Run a trial, a sweep or a command from the command line; the exit code says how it ended.

`lora-lab` and `python -m lora_lab` both start here. commands.py lists the commands.

The worker's process imports this module by name, so everything heavy is imported inside main().
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from omegaconf import DictConfig

    from lora_lab.outcome import Outcome
    from lora_lab.trial.session import Request


def main() -> None:
    """Run the command line. Always exits through SystemExit; docs/records.md lists the codes."""
    if not sys.platform.startswith("linux"):
        raise SystemExit(f"lora_lab runs on Linux (on Windows inside WSL2); this is {sys.platform}.")
    from lora_lab.commands import COMMANDS, RUN, call, meant
    from lora_lab.output import never_end_for_output

    first = sys.argv[1] if len(sys.argv) > 1 else ""
    if first == "--version":
        from lora_lab import __version__

        print(f"lora_lab {__version__}")
        raise SystemExit(0)
    if first in COMMANDS:
        raise SystemExit(call(first, sys.argv[2:]))
    if first == RUN:
        del sys.argv[1]
    elif meant(first):
        print(
            f"Refused, nothing was started:\n'{first}' is not a command. Did you mean {meant(first)}?", file=sys.stderr
        )
        raise SystemExit(2)
    never_end_for_output()
    import hydra

    from lora_lab.composition.arguments import in_order
    from lora_lab.composition.compose import CONF, register_schema
    from lora_lab.composition.hydra_errors import COMPOSING
    from lora_lab.config import InvalidInput
    from lora_lab.outcome import EXIT_INTERRUPTED, EXIT_REFUSED
    from lora_lab.store.folder_checks import check_working_folder

    try:
        check_working_folder()
    except InvalidInput as refusal:
        print(f"Refused, nothing was started:\n{refusal}", file=sys.stderr)
        raise SystemExit(EXIT_REFUSED) from None
    register_schema()
    try:
        with COMPOSING:
            sys.argv[1:] = in_order(sys.argv[1:])
            hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(job)()
    except KeyboardInterrupt:
        raise SystemExit(EXIT_INTERRUPTED) from None
    raise SystemExit(0)


def job(composed: "DictConfig", run: "Callable[[Request], Outcome] | None" = None) -> int:
    """Run one composed trial. A trial of a sweep returns its exit code; a single trial exits with it.

    Args:
        run: takes the trial; `run_session` unless it is given.
    """
    from dataclasses import replace

    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from lora_lab.composition.command import shortest_command
    from lora_lab.composition.compose import load
    from lora_lab.composition.explanations import COMPOSITION_ERRORS
    from lora_lab.composition.hydra_errors import COMPOSING
    from lora_lab.composition.keys import chosen_options
    from lora_lab.config import InvalidInput
    from lora_lab.options import ClusterKind, PlacementKind
    from lora_lab.outcome import EXIT_REFUSED
    from lora_lab.places_config import ClusterConfig, PlacementConfig
    from lora_lab.reading import Damaged, parsed, typed
    from lora_lab.resume import SETTINGS_OF_THE_JOB, resumption
    from lora_lab.store.folder_checks import check_chdir, leave_empty
    from lora_lab.store.sweep_folder import Membership
    from lora_lab.store.trial_folder import TrialFolder
    from lora_lab.trial.session import Request, run_session

    COMPOSING.over()
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    in_sweep = hydra_config.mode is RunMode.MULTIRUN
    handed = hydra_config.sweeper.get("trial") if in_sweep else None  # other sweepers pass nothing
    try:
        check_chdir(hydra_config.job.chdir)
        choices = chosen_options(hydra_config.runtime.choices)
        try:
            config = load(composed)
        except InvalidInput as fault:
            if composed.get("resume") is not True or in_sweep:
                raise
            raise InvalidInput(*fault.args, SETTINGS_OF_THE_JOB) from fault
        if not in_sweep and config.repeats != 1:
            raise InvalidInput("repeats applies to sweeps only. Add -m, or choose a sweep with sweep=NAME.")
        if config.placement.kind is PlacementKind.each_gpu and not handed:
            raise InvalidInput(
                "placement=each_gpu runs the trials of a sweep side by side. Add -m and several values of a setting, "
                "for example -m batch_size=1,2, or leave placement=each_gpu out. device=gpu:N chooses a card."
            )
        if config.cotrain and not handed:
            raise InvalidInput(
                "cotrain trains points of a sweep together. Add -m and several values of a setting, for example -m "
                "method.rank=8,16 cotrain=rank, or leave it out."
            )
        if config.placement.kind is PlacementKind.each_gpu:  # each of its trials is an ordinary one, on one device
            config, choices["placement"] = replace(config, placement=PlacementConfig()), PlacementKind.one.name
        cluster = config.cluster.kind
        if cluster is not ClusterKind.local:
            if not handed:
                raise InvalidInput(
                    f"cluster={cluster.name} runs the trials of a sweep on other machines. Add -m and several values "
                    "of a setting, for example -m batch_size=1,2, or leave it out."
                )
            config, choices["cluster"] = replace(config, cluster=ClusterConfig()), ClusterKind.local.name
        if config.resume and not in_sweep:
            request = resumption(folder, config, choices, hydra_config.overrides.task)
        else:
            try:
                alone = replace(config, cotrain=[])
                command = shortest_command(alone, choices, hydra_config.runtime.config_sources)
            except COMPOSITION_ERRORS:  # a label must not stop a trial
                command = " ".join(["python -m lora_lab", *hydra_config.overrides.task])
            member = typed(Membership, parsed(handed)) if handed else None
            request = Request(
                config=config,
                choices=choices,
                command=command,
                folder=folder,
                in_sweep=in_sweep,
                member=member,
                resumed=TrialFolder(folder).manifest() if member else None,  # the sweep chose the folder of a job
            )
        code = (run or run_session)(request).exit_code
    except (InvalidInput, Damaged) as refusal:
        print(f"Refused, nothing was trained:\n{refusal}", file=sys.stderr)
        leave_empty(folder)
        code = EXIT_REFUSED
    if not in_sweep:
        raise SystemExit(code)
    return code


if __name__ == "__main__":
    main()
