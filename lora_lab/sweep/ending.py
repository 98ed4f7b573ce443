"""End a sweep: its table, its last delivery, its exit code."""

from contextlib import suppress

from lora_lab.outcome import EXIT_INTERRUPTED, Outcome, combined_exit_code
from lora_lab.store.outbox import Outbox
from lora_lab.store.sweep_folder import SKIPPED, Planned, SweepFolder
from lora_lab.sweep.display import show_table, write_table


def end_sweep(folder: SweepFolder, trials: list[Planned], store: Outbox, code: int, continues: bool = True) -> None:
    """Deliver what the store did not take at once, and print the table.

    Args:
        code: the exit code of the last launch.
        continues: whether resume=true runs again what was not measured.
    """
    attempts = folder.attempts(trials)
    places: list[str] = []
    if folder.read().record.outcome != Outcome.finished.value:  # it ran now, or was killed at its very end
        whole = folder.read().trials  # earlier starts may have asked for more
        try:
            write_table(folder.path / "trials.csv", whole, folder.attempts(whole))
        except OSError as error:
            places.append(f"{folder.path / 'trials.csv'} was not written ({error.strerror})")
        with suppress(OSError):
            ended = Outcome.killed if code == EXIT_INTERRUPTED else Outcome.finished
            folder.end(ended, folder.attempts(whole))
        run_id = store.deliver_all(folder)
        places += store.where(run_id) if run_id else []
        if store.fault:
            places.append(store.outlook("the records"))
    show_table(trials, attempts)
    left = {attempt.outcome if attempt else "" for attempt in attempts if attempt is None or not attempt.done}
    if continues and left - {SKIPPED}:
        places.append("to run again what was not measured, add resume=true to the same command")
    if continues and SKIPPED in left:
        places.append("to run what was skipped all the same, add plan=all resume=true")
    for place in places:
        print(place)


def code_of(folder: SweepFolder, trials: list[Planned]) -> int:
    """Return the exit code of a sweep that ran to its end."""
    attempts = folder.attempts(trials)
    return combined_exit_code([1 if each is None else Outcome(each.outcome).exit_code for each in attempts])
