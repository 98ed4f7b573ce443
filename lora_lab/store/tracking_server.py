"""A tracking server: whether MLflow answers at an address, and soon."""

import http.client
import threading
import urllib.error
import urllib.request

from lora_lab.store.errors import TrackingFailed
from lora_lab.store.server_address import fault_of_address

_SECONDS = 3.0


def check_reachable(uri: str) -> None:
    """MLflow itself would try for minutes, and believe whatever answers.

    Raises: TrackingFailed."""
    fault = fault_of_address(uri)
    if fault:
        raise TrackingFailed(f"the tracking server was not reached: its address {fault}")
    found: list[str] = []
    # a thread, since no timeout of a socket ends a server that sends a byte a second
    asking = threading.Thread(target=lambda: found.append(_fault_of(uri)), daemon=True, name="tracking server")
    asking.start()
    asking.join(_SECONDS + 1)
    fault = found[0] if found else f"was not reached (no whole answer within {_SECONDS + 1:g} seconds)"
    if fault:
        remedy = "Start one there, or give another tracking.uri to trials to come." if "what answers" in fault else ""
        raise TrackingFailed(f"the tracking server {uri} {fault}", remedy)


def _fault_of(uri: str) -> str:
    """What keeps an MLflow server's /health from being read; empty when it says that it is well."""
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=_SECONDS) as answer:
            said = answer.read(100)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403, 404):
            return ""  # wants a login, which MLflow sends, or is hosted without /health: seen when it is given a record
        return f"is not well (HTTP status {error.code})"
    except http.client.HTTPException as error:
        return f"was reached, but what answers there is no web server ({type(error).__name__})"
    except (OSError, ValueError) as error:
        return f"was not reached ({error})"
    return "" if said.strip() == b"OK" else "was reached, but what answers there is no MLflow server"
