"""Open MLflow's UI on this machine, with the table of trials: lora-lab ui"""

import argparse
import os
import socket
import sys
from collections.abc import Sequence

from lora_lab.config import InvalidInput
from lora_lab.outcome import EXIT_REFUSED
from lora_lab.output import never_end_for_output
from lora_lab.store.errors import TrackingFailed
from lora_lab.store.local_store import local_address
from lora_lab.store.mlflow_client import is_server, tables, ui_address

_HOST = "127.0.0.1"
_PORT = 5000


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. This process becomes MLflow's own server, which Ctrl-C ends."""
    never_end_for_output()
    parser = argparse.ArgumentParser(prog="lora-lab ui", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--store", metavar="URI", help="the store's address (default: the local store under mlruns/)")
    parser.add_argument("--port", type=int, help=f"port to listen at on {_HOST} (default: the first free from {_PORT})")
    asked = parser.parse_args(arguments)
    try:
        uri = asked.store or local_address()
        pages = tables(uri)
        port = asked.port or free_port(_PORT)
    except (InvalidInput, TrackingFailed) as refusal:
        print(refusal, file=sys.stderr)
        return EXIT_REFUSED
    for experiment, page in pages.items():
        print(f"trials of {experiment}: {ui_address(uri, port)}/{page}", flush=True)
    if is_server(uri):
        return 0
    server = ["ui", "--backend-store-uri", uri, "--host", _HOST, "--port", str(port), "--workers", "1"]
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", *server])


def free_port(first: int) -> int:
    """Return the first port from `first` on at which nothing listens.

    Raises: InvalidInput."""
    for port in range(first, first + 100):
        with socket.socket() as probe:
            if probe.connect_ex((_HOST, port)) != 0:
                return port
    raise InvalidInput(f"ports {first} to {first + 99} are all in use. Choose another with --port NUMBER.")


if __name__ == "__main__":
    sys.exit(main())
