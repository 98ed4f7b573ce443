"""Check whether an MLflow tracking server answers at an address within seconds."""

import http.client
import threading
import urllib.error
import urllib.request

from lora_lab.store.errors import TrackingFailed
from lora_lab.store.server_address import fault_of_address

_SECONDS = 3.0


def check_reachable(uri: str) -> None:
    """Check that an MLflow server answers. MLflow itself would try for minutes, and accept any answer.

    Raises: TrackingFailed."""
    fault = fault_of_address(uri)
    if fault:
        raise TrackingFailed(f"the tracking server was not reached: its address {fault}")
    found: list[str] = []
    # a thread, because a socket's timeout never ends when a server sends one byte per second
    asking = threading.Thread(target=lambda: found.append(_fault_of(uri)), daemon=True, name="tracking server")
    asking.start()
    asking.join(_SECONDS + 1)
    fault = found[0] if found else f"was not reached (no complete answer within {_SECONDS + 1:g} seconds)"
    if fault:
        remedy = "Start one there, or use another tracking.uri for later trials." if "what answers" in fault else ""
        raise TrackingFailed(f"the tracking server {uri} {fault}", remedy)


def _fault_of(uri: str) -> str:
    """Return why an MLflow server's /health cannot be read; empty when the server reports that it works."""
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=_SECONDS) as answer:
            said = answer.read(100)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403, 404):
            return ""  # needs a login, which MLflow sends, or has no /health: delivery shows whether it works
        return f"reports that it does not work (HTTP status {error.code})"
    except http.client.HTTPException as error:
        return f"was reached, but what answers there is not a web server ({type(error).__name__})"
    except (OSError, ValueError) as error:
        return f"was not reached ({error})"
    return "" if said.strip() == b"OK" else "was reached, but what answers there is not an MLflow server"
