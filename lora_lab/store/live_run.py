"""Show a job in its store while it runs: a thread of the parent that sends its series at a bounded rate.

What it does not send, the outbox delivers with the record at the end."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from lora_lab.config import InvalidInput, TrackingConfig
from lora_lab.events import Event
from lora_lab.job_events import JobPlanned
from lora_lab.options import TrackingKind
from lora_lab.store.errors import TrackingFailed
from lora_lab.store.live_series import LiveSeries
from lora_lab.store.mlflow_store import open_tracker
from lora_lab.store.record import RUNNING
from lora_lab.store.tracker import Tracker
from lora_lab.store.trial_folder import Manifest
from lora_lab.telemetry.sampler import Sample

EVERY_SECONDS = 15.0

_LONGEST_WAIT_SECONDS = 600.0
"""A store that does not answer is asked less and less often, but at least this often."""

ENDING_SECONDS = 30.0
"""How long the end of a job waits for a request to the store that is under way."""


class LiveRun:
    """A job's run in the store while the job runs. Nothing waits for the store, and its faults end nothing.

    The run is made when the job's length is known, which is after its input was checked. A trial that is not a job
    has no such moment, and sends nothing."""

    def __init__(
        self,
        tracking: TrackingConfig,
        asked: Manifest,
        samples: Sequence[Sample],
        tell: Callable[[str], None],
        every_seconds: float = EVERY_SECONDS,
    ) -> None:
        """Get ready.

        Args:
            asked: what is known of the job before it starts.
            samples: the readings of the sensors so far; the sampler goes on adding to them.
            tell: shows a text to the user. The thread calls it.
        """
        self._tracking = tracking
        self._asked = asked
        self._series = LiveSeries(samples, asked.unix_minus_monotonic)
        self._tell = tell
        self._every = every_seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="live run")
        self._tracker: Tracker | None = None
        self._run_id: str | None = None
        self._said: set[str] = set()

    def see(self, event: Event) -> None:
        """Take in one event. This returns at once."""
        self._series.see(event)
        if (
            isinstance(event, JobPlanned)
            and self._thread.ident is None
            and self._tracking.kind is not TrackingKind.none
        ):
            self._thread.start()

    def ended(self) -> bool:
        """End the thread. Return False when a request to the store is still under way after ENDING_SECONDS; then
        nothing else may be sent, because the run could be made twice."""
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join(ENDING_SECONDS)
        return not self._thread.is_alive()

    def _run(self) -> None:
        wait = self._every
        while not self._over.is_set():
            try:
                self._send()
                wait = self._every
            except (TrackingFailed, InvalidInput) as fault:
                self._tracker = self._run_id = None  # both may be others the next time
                self._say("fault", f"the store does not show all of this job while it runs: {fault}")
                wait = min(2 * wait, _LONGEST_WAIT_SECONDS)
            self._over.wait(wait)

    def _send(self) -> None:
        """Send what the store lacks.

        Raises: TrackingFailed, InvalidInput."""
        tracker = self._tracker = self._tracker or open_tracker(self._tracking)
        if self._run_id is None:
            asked = self._asked.record
            begun = replace(asked, outcome=RUNNING, tags={**asked.tags, "outcome": RUNNING}, metrics={}, series=[])
            self._run_id = tracker.deliver(begun, [])
            if asked.parent is None:  # a sweep says it once, at its end
                self._say("where", "\n".join(tracker.where(self._run_id)))
        points = self._series.points(time.monotonic())
        if points and not self._over.is_set():
            tracker.extend(self._run_id, points)
        self._series.sent()

    def _say(self, what: str, text: str) -> None:
        """Show a text to the user, the first one of its kind only."""
        if what not in self._said and not self._over.is_set():
            self._said.add(what)
            self._tell(text)
