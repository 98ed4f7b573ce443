"""Pack the records of sweeps into one file, or make a store from such a file: python -m lora_lab.records

    python -m lora_lab.records pack FOLDER... OUT.jsonl.gz
    python -m lora_lab.records unpack FILE.jsonl.gz ROOT

FOLDER is a sweep's folder below multirun/. The store is ROOT/mlflow.db. Exit code 2 when something cannot be read or
written.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lora_lab.config import InvalidInput
from lora_lab.outcome import EXIT_REFUSED
from lora_lab.store.errors import TrackingFailed
from lora_lab.store.local_store import address_of
from lora_lab.store.records_file import pack, unpack


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    asked = _parser().parse_args(arguments)
    try:
        if asked.command == "pack":
            print(f"{pack(asked.folders, asked.out)} records in {asked.out}")
        else:
            print(f"{unpack(asked.file, asked.root)} records in {asked.root}")
            address = address_of(asked.root / "mlflow.db")
            print(f"to report on them: python -m lora_lab.report --store {address}")
    except (InvalidInput, TrackingFailed, OSError, ValueError) as fault:
        print(fault, file=sys.stderr)
        return EXIT_REFUSED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lora_lab.records", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="the records of sweeps into one file")
    packing.add_argument("folders", metavar="FOLDER", nargs="+", type=Path, help="a sweep's folder below multirun/")
    packing.add_argument("out", metavar="OUT.jsonl.gz", type=Path)
    unpacking = commands.add_parser("unpack", help="a local store from such a file")
    unpacking.add_argument("file", metavar="FILE.jsonl.gz", type=Path)
    unpacking.add_argument("root", metavar="ROOT", type=Path, help="the store's folder; it is made if there is none")
    return parser


if __name__ == "__main__":
    sys.exit(main())
