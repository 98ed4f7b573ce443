"""Show the rows of a data set as the model would read them, and count what training would make of them.

    python -m lora_lab.data data=jsonl data.path=my_rows.jsonl model=qwen2_5_1_5b seq_len=1024

It takes the settings of a trial, loads the tokenizer alone and trains nothing.
"""

import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lora_lab.composition.once import compose_once
from lora_lab.config import InvalidInput, TrialConfig
from lora_lab.events import DataCounted
from lora_lab.options import DataSource
from lora_lab.outcome import EXIT_INTERRUPTED, EXIT_REFUSED
from lora_lab.output import never_end_for_output
from lora_lab.trial.inputs import check_data
from lora_lab.worker.preview import Piece, Preview, preview

EXIT_FAILED = 1

_MOST_TOKENS = 400
"""Of a row; of a longer one the beginning and the end are shown."""
_TRAINED = "bold green"
_NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}

_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | dict.fromkeys(
    range(127, 160), 0xFFFD
)
"""Characters that would steer a terminal, and what is shown instead: their pictures, or the sign for an unknown one."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    never_end_for_output()
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(arguments):
        print(f"usage: lora-lab data [group=option ...] [key=value ...]\n\n{__doc__}")
        return 0
    try:
        config = compose_once(arguments)
        check_data(config)
        show(_in_worker(config), config, Console())
    except InvalidInput as refusal:
        print(f"Refused:\n{refusal}", file=sys.stderr)
        return EXIT_REFUSED
    except BrokenProcessPool:
        print("The process that read the rows ended early, perhaps for lack of memory.", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0


def _in_worker(config: TrialConfig) -> Preview:
    """Look at the rows in another process, which alone imports torch.

    Raises: InvalidInput, BrokenProcessPool."""
    os.environ.update(_NO_GPU)  # of this process, which ends soon, for the one it starts
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_be_quiet) as pool:
        return pool.submit(preview, config).result()


def _be_quiet() -> None:
    """Drop what libraries print in the worker."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def show(found: Preview, config: TrialConfig, console: Console) -> None:
    """Print rows and counts. Without colours, what is trained stands in double square brackets."""
    plain = console.color_system is None or console.no_color
    marked = "in [[double brackets]]" if plain else "green"
    console.print(
        f"The first {len(found.rows)} rows to train on, as the model reads them. What is trained is {marked}.",
        highlight=False,
        markup=False,
    )
    for number, row in enumerate(found.rows, start=1):
        tokens = sum(piece.tokens for piece in row.pieces)
        trained = sum(piece.tokens for piece in row.pieces if piece.trained)
        cut = f", cut at seq_len={config.seq_len}" if row.cut else ""
        console.print(f"\nrow {number}: {tokens:,} tokens, {trained:,} trained{cut}", highlight=False, style="bold")
        console.print(Padding(_text(row.pieces, plain), (0, 0, 0, 2)))
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in _counts(found, config):
        table.add_row(Text(name), Text(value))
    for warning in found.warnings:
        table.add_row(Text("warning"), Text(warning))
    console.print()
    console.print(table)


def _text(row: Sequence[Piece], plain: bool) -> Text:
    text = Text()
    for piece in row:
        shown = _shortened(piece).translate(_CONTROLS)
        if piece.trained and plain:
            text.append(f"[[{shown}]]")
        else:
            text.append(shown, style=_TRAINED if piece.trained else "")
    return text


def _shortened(piece: Piece) -> str:
    """Return a long piece's text without its middle."""
    if piece.tokens <= _MOST_TOKENS:
        return piece.text
    half = len(piece.text) * _MOST_TOKENS // piece.tokens // 2
    return f"{piece.text[:half]}\n  ... (about {piece.tokens - _MOST_TOKENS:,} tokens) ...\n{piece.text[-half:]}"


def _counts(found: Preview, config: TrialConfig) -> list[tuple[str, str]]:
    counted, read = found.counted, found.counted.rows_read
    rows = [
        ("rows", f"{read:,} read: {counted.rows_train:,} to train on, {counted.rows_heldout:,} held out"),
        ("tokens to train on", f"{counted.trained:,} of {counted.real:,} that are read in one epoch"),
    ]
    if counted.length_median is not None:
        rows.append(
            (
                "tokens per row",
                f"median {counted.length_median:,}, 95 % have at most {counted.length_p95:,}, "
                f"the longest {counted.length_max:,}",
            )
        )
        rows.append(
            (
                f"cut at seq_len={config.seq_len}",
                f"{_of(counted.rows_truncated, read)} rows lose {counted.tokens_cut:,} tokens",
            )
        )
    rows += [
        ("rows with nothing to train on", _of(counted.rows_without_labels, read)),
        ("rows that lose text in the template", _of(counted.rows_lost or 0, read)),
        ("rows equal to an earlier one", _of(counted.rows_repeated or 0, read)),
        ("rows nearly equal to an earlier one", _near(counted, config)),
        (
            "held-out rows whose prompt is trained too",
            _of(counted.rows_heldout_prompt_trained or 0, counted.rows_heldout),
        ),
    ]
    if counted.rows_dropped:
        rows.append((f"left out by data.duplicates={config.data.duplicates.name}", _of(counted.rows_dropped, read)))
    if counted.rows_in_both:
        rows.append(("left out because they are held out", _of(counted.rows_in_both, read)))
    estimate = f" (from {found.estimated_from:,} rows)" if found.estimated_from < counted.rows_train else ""
    padded = ", ".join(f"{share:.0%} with data.batching={name}" for name, share in found.padded.items())
    rows.append((f"padding at batch_size={config.batch_size}", f"{padded}{estimate}"))
    scripts = [f"{name} {share:.1%}" for name, share in found.scripts.items() if share >= 0.001]
    rows.append(("scripts of what is trained", (", ".join(scripts[:6]) or "no letters") + estimate))
    rows.append(("an answer ends with", counted.end_of_turn or "nothing"))
    return rows


def _near(counted: DataCounted, config: TrialConfig) -> str:
    if counted.rows_near_repeated is not None:
        return _of(counted.rows_near_repeated, counted.rows_read)
    if config.data.source is DataSource.random_tokens:
        return "not counted: the tokens are random"
    return "not counted: too many rows (data.duplicates=near counts and drops them)"


def _of(count: int, total: int) -> str:
    return f"{count:,} of {total:,}" + (f" ({count / total:.1%})" if count else "")


if __name__ == "__main__":
    sys.exit(main())
