"""One trial from the worker's side: data, model, evaluation, training, evaluation, adapter."""

import contextlib
import os
import resource
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from lora_lab.config import Attention, DataSource, Quantization, TrialConfig, Weights
from lora_lab.events import DataCounted, Ended, Evaluated, Phase, Progress, Ran, Warned
from lora_lab.matmul_cache import load_rate, store_rate
from lora_lab.outcome import End, Outcome, Unsupported, end_of
from lora_lab.packages import converted_folder
from lora_lab.worker.callback import Emit, PhaseClock, TelemetryCallback
from lora_lab.worker.data import Example, Examples, check_token_ids, load_examples, pad_id, train_collator
from lora_lab.worker.engines.engine import Engine, shapes
from lora_lab.worker.evaluation import heldout_loss
from lora_lab.worker.matmul_rate import measure_matmul_rate, rate_key
from lora_lab.worker.models import (
    check_model,
    convert,
    load_architecture,
    load_model,
    load_tokenizer,
    working_dtype,
)
from lora_lab.worker.readback import compare, optimizer_memory, read_back
from lora_lab.worker.training import check_optimizer, make_trainer
from lora_lab.worker.vram_limit import Capacity
from lora_lab.worker.weight_counts import Uncountable, count_model


def run_trial(config: TrialConfig, folder: Path, emit: Emit) -> None:
    """Run one trial and say everything about it through `emit`; the last event is Ended.

    Args:
        config: what to run.
        folder: where the adapter is left, as `adapter/` in PEFT's layout.
        emit: takes each event; must return quickly.
    """
    clock = PhaseClock(emit)
    try:
        clock.enter(Phase.start)
        device = _device()
        clock.capacity = Capacity(config.vram_limit_gib, device)
        _check_machine(config, device)
        if not config.share_device:  # beside others the rate would be theirs too
            _tell_matmul_rate(config, device, clock, emit)
        transformers.set_seed(config.seed)
        _train(config, folder, emit, clock, device)
        clock.leave()
        end = End(outcome=Outcome.finished, reason="")
    except Exception as error:  # the one broad except: every way to stop becomes a recorded end
        end = end_of(error)
        with contextlib.suppress(RuntimeError):  # a CUDA context that failed answers nothing any more
            clock.leave()
    emit(
        Ended(
            t=time.monotonic(),
            outcome=end.outcome.value,
            reason=end.reason,
            traceback=end.traceback,
            step=end.step,
            asked_bytes=end.asked_bytes,
            peak_host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # Linux counts in KiB
        )
    )


def _device() -> torch.device:
    """The one card that CUDA_VISIBLE_DEVICES shows; the CPU when it is set and empty.

    Raises: RuntimeError when a card is shown that torch does not see, rather than train on the CPU in silence.
    """
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown == "":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError(f"CUDA_VISIBLE_DEVICES={shown}, but torch sees no GPU; is this torch a CUDA build?")
    return torch.device("cuda", 0)


def _check_machine(config: TrialConfig, device: torch.device) -> None:
    """Raise what can be known before data and model are touched."""
    check_optimizer(config.optimizer)
    if config.attention is Attention.flash_attention_2 and not transformers.utils.is_flash_attn_2_available():
        raise Unsupported("attention=flash_attention_2 needs the package flash-attn and a GPU; use attention=sdpa.")
    needs_bitsandbytes = config.method.quantization is not Quantization.none or "bit" in (config.optimizer.optim or "")
    if needs_bitsandbytes and device.type == "cuda":
        import bitsandbytes

        # it chooses its side while being imported, for good: see worker/preload.py
        if not getattr(bitsandbytes.cextension.lib, "compiled_with_cuda", False):
            raise RuntimeError(
                "bitsandbytes runs its CPU side although a GPU is there; 4-bit and 8-bit work would be wrong."
            )


def _tell_matmul_rate(config: TrialConfig, device: torch.device, clock: PhaseClock, emit: Emit) -> None:
    """How fast the device multiplies: measured once for a device and a precision, then remembered."""
    dtype = working_dtype(config.precision.dtype, device)
    key = rate_key(device, dtype)
    rate = load_rate(key)
    if rate is None:
        clock.enter(Phase.matmul_rate)
        rate = measure_matmul_rate(device, dtype)
        store_rate(key, rate)
    emit(rate)


def _train(config: TrialConfig, folder: Path, emit: Emit, clock: PhaseClock, device: torch.device) -> None:
    package = config.model.package
    if config.model.weights is Weights.pretrained and package and not converted_folder(package).is_dir():
        clock.enter(Phase.conversion)
        convert(package)
    clock.enter(Phase.data)
    architecture = load_architecture(config.model)

    def warn(text: str) -> None:
        emit(Warned(t=time.monotonic(), text=text))

    for remark in check_model(config, architecture):
        warn(remark)
    tokenizer = load_tokenizer(config.model)
    vocab_size = architecture.get_text_config().vocab_size
    examples = load_examples(config, tokenizer, vocab_size)
    check_token_ids(examples, tokenizer, vocab_size)
    _report_data(config, examples, emit)

    clock.enter(Phase.model)
    model = load_model(config, architecture, device, warn)
    try:
        emit(count_model(model))
    except Uncountable as error:
        emit(Warned(t=time.monotonic(), text=f"FLOPs are not counted: {error}"))
    padding = pad_id(tokenizer, vocab_size)
    collator = train_collator(config, padding)
    callback = TelemetryCallback(config.measure, device, emit, clock)
    engine = Engine(config, model, shapes(config, examples.train, collator), callback.attention, emit, clock)
    callback.watch(model)
    trainer = make_trainer(config, model, examples.train, collator, [*engine.callbacks, callback], str(folder), device)
    engine.attach(trainer)
    callback.scaler = trainer.accelerator.scaler
    callback.on_stepped = lambda: _report_what_ran(config, trainer, engine, callback, emit, device)

    heldout = examples.heldout[: config.measure.eval_rows]
    _evaluate(Phase.evaluation_before, config, model, heldout, padding, emit, clock, device)
    model.train()
    trainer.train()
    # Trainer leaves an autocast wrapper on forward that would turn whole logits to fp32
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    _evaluate(Phase.evaluation_after, config, model, heldout, padding, emit, clock, device)

    clock.enter(Phase.saving)
    try:
        model.save_pretrained(folder / "adapter", safe_serialization=True, save_embedding_layers=False)
    except (OSError, SafetensorError) as error:  # a full disk must not cost the figures
        emit(Warned(t=time.monotonic(), text=f"the adapter was not saved: {error}"))


def _report_data(config: TrialConfig, examples: Examples, emit: Emit) -> None:
    emit(
        DataCounted(
            t=time.monotonic(),
            rows_read=examples.rows_read,
            rows_train=len(examples.train),
            rows_heldout=len(examples.heldout),
            rows_truncated=examples.rows_truncated,
            rows_without_labels=examples.rows_without_labels,
            real=sum(len(example.ids) for example in examples.train),
            trained=sum(example.trained for example in examples.train),
            digest=examples.digest,
            rows_lost=examples.rows_lost,
            rows_apart=examples.rows_apart,
            end_of_turn=examples.end_of_turn,
            rows_repeated=examples.rows_repeated,
            rows_heldout_prompt_trained=examples.rows_heldout_prompt_trained,
        )
    )
    if config.data.source is DataSource.random_tokens:
        return
    warnings = list(examples.remarks)
    if examples.rows_without_labels:
        warnings.append(
            f"{examples.rows_without_labels} of {examples.rows_read} rows have no token to train on within "
            f"seq_len={config.seq_len} and are left out"
        )
    if examples.rows_truncated > 0.05 * examples.rows_read:
        warnings.append(
            f"{examples.rows_truncated} of {examples.rows_read} rows are longer than seq_len={config.seq_len} "
            "and are cut"
        )
    if config.data.rows and examples.rows_read < config.data.rows:
        warnings.append(f"data.rows={config.data.rows}, and the data has only {examples.rows_read} rows")
    if examples.rows_repeated:
        warnings.append(
            f"{examples.rows_repeated} of {examples.rows_read} rows are equal to an earlier one; equal rows are held "
            "out together, or trained on together"
        )
    if examples.rows_heldout_prompt_trained:
        warnings.append(
            f"{examples.rows_heldout_prompt_trained} of {len(examples.heldout)} held-out rows have a prompt that is "
            "trained on too, with another answer"
        )
    for text in warnings:
        emit(Warned(t=time.monotonic(), text=text))


def _report_what_ran(
    config: TrialConfig, trainer: Any, engine: Engine, callback: TelemetryCallback, emit: Emit, device: torch.device
) -> None:
    """Read back what runs; raise when it is not what was asked for, so that no figure is measured of it."""
    facts = read_back(trainer, callback.attention.seen) | engine.ran()
    differences, stand_ins = compare(facts, config, device)
    emit(Ran(t=time.monotonic(), facts=facts, stand_ins=stand_ins))
    emit(optimizer_memory(trainer))
    if "math" in facts["attention_kernel"] and config.attention is Attention.sdpa:
        text = "attention=sdpa runs torch's plain math kernel here, not a fused one: compare its figures with care"
        emit(Warned(t=time.monotonic(), text=text))
    if differences:
        raise RuntimeError("what ran is not what was asked for: " + "; ".join(differences))


def _evaluate(
    phase: Phase,
    config: TrialConfig,
    model: Any,
    heldout: list[Example],
    pad_id: int,
    emit: Emit,
    clock: PhaseClock,
    device: torch.device,
) -> None:
    if not heldout:
        return
    clock.enter(phase)

    def progress(done: int, total: int) -> None:
        emit(Progress(t=time.monotonic(), done=done, total=total))

    loss, tokens = heldout_loss(model, heldout, config.batch_size, pad_id, config.precision.dtype, device, progress)
    emit(Evaluated(t=time.monotonic(), phase=phase.value, loss=loss, rows=len(heldout), tokens=tokens))
