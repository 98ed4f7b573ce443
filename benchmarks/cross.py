"""Every optimizer x precision x method with the tiny model: finished, and what ran is what was asked for.

    python -m benchmarks.cross OUT

One real multirun a method, side by side (this is no timing).
"""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

from lora_lab.composition.compose import CONF

AXES = {
    group: sorted(path.stem for path in (CONF / group).glob("*.yaml")) for group in ("optimizer", "precision", "method")
}


def main() -> None:
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    running = []
    for method in AXES["method"]:
        place = Path("multirun/cross").resolve() / method
        command = [sys.executable, "-m", "lora_lab", "-m", f"method={method}", f"hydra.sweep.dir={place}"]
        command += [f"{group}={','.join(AXES[group])}" for group in ("optimizer", "precision")]
        command += ["model=tiny", "measure=quick", "share_device=true", f"tracking.root={place}/mlruns"]
        place.mkdir(parents=True, exist_ok=True)
        running.append(
            (method, subprocess.Popen(command, stdout=(place / "out.txt").open("w"), stderr=subprocess.STDOUT))
        )
    codes = {method: process.wait() for method, process in running}
    records = [json.loads(path.read_text()) for path in sorted(Path("multirun/cross").glob("*/*/record.json"))]
    lines = [
        "| cell | outcome | optimizer | state | weights | autocast | GradScaler | attention kernel | stand-ins |",
        "|" + "---|" * 9,
    ]
    for record in records:
        tag = record["tags"].get
        cells = [
            record["name"],
            record["outcome"],
            f"{tag('ran.optimizer_class')} {tag('ran.optimizer_bits')} bit, paged {tag('ran.optimizer_paged')}",
        ]
        cells += [
            str(tag(f"ran.{k}"))
            for k in ("optimizer_state_dtypes", "weight_dtypes", "autocast", "grad_scaler", "attention_kernel")
        ]
        lines.append("| " + " | ".join([*cells, str(tag("stand_ins"))]) + " |")
        if record["outcome"] != "finished":
            print(record["name"], record["tags"]["reason"])
    expected = len(AXES["optimizer"]) * len(AXES["precision"]) * len(AXES["method"])
    verdict = (
        f"{len(records)} of {expected} recorded: {dict(Counter(r['outcome'] for r in records))}; exit codes {codes}"
    )
    tags = {k: v for k, v in records[0]["tags"].items() if k.startswith(("version.", "device"))}
    head = "\n".join(f"- {key}: {value}" for key, value in tags.items())
    (out / "cross.md").write_text(
        f"# Every optimizer, precision and method, tiny model\n\n{head}\n\n{verdict}\n\n" + "\n".join(lines) + "\n"
    )
    print(verdict)


if __name__ == "__main__":
    main()
