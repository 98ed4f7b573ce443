"""Run a trial's engine: change the model before Trainer gets it, and compile or record steps when training begins."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_lab.config import TrialConfig
from lora_lab.events import Compiled, EngineDone, Warned
from lora_lab.options import Attention, Batching, Checkpointing, EngineKind
from lora_lab.outcome import Unsupported
from lora_lab.phase import Phase
from lora_lab.worker.attention import AttentionKernels, kernels_of
from lora_lab.worker.data import IGNORED, Collator, Example, sizes_of
from lora_lab.worker.engines.attention_masks import AS_NEEDED, always_mask, attention_of, leave_out_masks, needs_no_mask
from lora_lab.worker.engines.checkpointed_calls import checkpoint_layers
from lora_lab.worker.engines.chunked_loss import use_chunked_loss
from lora_lab.worker.engines.compile_cache import compiling
from lora_lab.worker.engines.compiled import check_breaks, compilations, compile_layers, decoder_layers, graph_breaks
from lora_lab.worker.engines.graph_step import Batch, GraphStep, forward_and_backward, tensors, use_graph_step
from lora_lab.worker.engines.host_embeddings import move_embeddings
from lora_lab.worker.engines.inspection import check_liger_support, engine_of, has_dropout, loss_is_chunked
from lora_lab.worker.engines.offloaded_checkpoints import offload_checkpoints
from lora_lab.worker.engines.tiled_mlp import mlp_tile_of, tile_mlps
from lora_lab.worker.engines.trainer_shortcuts import TrainerShortcuts
from lora_lab.worker.host_layers import no_room
from lora_lab.worker.models import working_dtype
from lora_lab.worker.phases import Emit, PhaseClock
from lora_lab.worker.shards import shards_of
from lora_lab.worker.trainables.trainable import base_of, trained_parameters


def trainer_arguments(config: TrialConfig) -> dict[str, Any]:
    """Return what the engine adds to TrainingArguments."""
    if config.engine.kind is EngineKind.graph:
        # a blocking copy would wait for the whole step before it
        return {"accelerator_config": {"non_blocking": True}}
    if config.engine.kind is not EngineKind.liger:
        return {}
    fused = config.engine.chunked_loss
    return {
        "use_liger_kernel": True,
        "liger_kernel_config": {"fused_linear_cross_entropy": fused, "cross_entropy": not fused},
    }


class Engine(TrainerCallback):
    """Prepares the model when it is made, and a step of each shape when training begins, before any measurement."""

    def __init__(
        self,
        config: TrialConfig,
        model: Any,
        batches: list[Batch],
        attention: AttentionKernels,
        emit: Emit,
        clock: PhaseClock,
        fuses: bool = True,
    ) -> None:
        """Change `model`, never its class.

        Args:
            model: on the device that it will be trained on.
            batches: one of every shape that training can bring, longest rows first; see `shapes`.
            attention: gets the kernels that run in the steps that are prepared.
            fuses: whether engine=graph takes an adapter's products together with the base's; not where several adapters
                train together.

        Raises: Unsupported when the engine can't run this model.
        """
        kind = config.engine.kind
        if config.engine.host_embeddings is not False and model.device.type == "cuda" and shards_of(model) is None:
            move_embeddings(model, config.engine.host_embeddings)
            torch.cuda.empty_cache()  # where they lay before
        self._emit = emit
        self._clock = clock
        self._attention = attention
        self._model = model
        self._forward = model.forward
        """The model's own, before accelerate wraps it; without the telemetry's hooks."""
        self._batches = batches
        self._compiles = kind in (EngineKind.compile, EngineKind.graph)
        self._tile = config.engine.mlp_tile
        self._counts_labels = True
        self._warned: set[tuple[int, ...]] = set()
        self._step: GraphStep | None = None
        self._compiled = 0
        self.callbacks: list[TrainerCallback] = [self]
        """For Trainer, before all other callbacks."""
        dtype = working_dtype(config.precision.dtype, model.device)
        # as accelerate does
        self._autocast = functools.partial(torch.autocast, model.device.type, dtype, dtype is not torch.float32)
        if kind is EngineKind.liger:
            check_liger_support(model)
        elif config.engine.chunked_loss:  # liger brings its own
            use_chunked_loss(model, self._compiles, self._tile)
        if self._compiles:
            _settle_masks(config, model)
        copies = self._become_graph(config, model, fuses) if kind is EngineKind.graph else {}
        if self._tile is not None:
            tile_mlps(model, self._tile, self._compiles, copies, self._autocast)
        if self._compiles:
            compile_layers(model, whole=self._tile is None)
        _checkpoint(config, model)

    def _become_graph(self, config: TrialConfig, model: Any, fuses: bool) -> Mapping[Tensor, Tensor]:
        """Return the copies of trained parameters that the model's products then use."""
        if config.gradient_checkpointing is not Checkpointing.none and has_dropout(model):
            raise Unsupported(
                f"engine=graph with gradient_checkpointing={config.gradient_checkpointing.name}: this model has dropout"
                " of its own, whose random numbers checkpointing has to draw twice, and a CUDA graph can't keep their "
                "state. Use gradient_checkpointing=none or engine=compile."
            )
        # not at the top: they import bitsandbytes, which the server that workers are forked from must not
        from lora_lab.worker.engines.dequantize import use_fused_dequantization
        from lora_lab.worker.engines.fused_lora_layers import use_fused_lora

        # for graph alone: their launches cost more than they save where the host is waited for
        use_fused_dequantization(model)
        try:
            copies = use_fused_lora(model, working_dtype(config.precision.dtype, model.device)) if fuses else None
        except MemoryError as error:  # weights in host memory are stacked there
            raise no_room(config.engine.host_layers, error) from error
        # 16-bit copies of the adapters, kept from one use to the next, would go stale in a recording
        self._step = GraphStep(
            model,
            functools.partial(self._autocast, cache_enabled=False),
            copies=copies,
            accumulates=config.grad_accum_steps > 1,
        )
        self._step.on_unrecorded = self._warn_unrecorded
        use_graph_step(model, self._step)
        self._clock.replayed = self._step
        self.callbacks.append(TrainerShortcuts())
        return {} if copies is None else copies

    def attach(self, trainer: Any) -> None:
        """Take from the trainer what it has made for this model."""
        self._counts_labels = trainer.model_accepts_loss_kwargs
        if self._step is not None:
            self._step.use_scaler(trainer.accelerator.scaler)

    def release(self) -> None:
        """Free the memory of what was recorded; the next training records it again."""
        if self._step is not None:
            self._step.forget()

    @property
    def replay_peak_bytes(self) -> int:
        """Return the most memory in use in a replayed step, which torch's allocator does not see; 0 without replays."""
        return 0 if self._step is None else self._step.replay_peak_bytes

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Compile, and record, a step of each shape."""
        if not self._compiles:
            return
        self._clock.enter(Phase.compilation)
        model.train()
        breaks = graph_breaks()
        with compiling():
            began = time.monotonic()
            for batch in self._batches:
                # Trainer passes the number of labels of the whole step to models that take it
                count = {"num_items_in_batch": (batch["labels"] != IGNORED).sum()} if self._counts_labels else {}
                self._make_ready({**batch, **count})
            if self._model.device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
        if self._tile is not None:
            check_breaks(graph_breaks() - breaks)
        self._compiled = compilations()
        self._emit(
            Compiled(
                t=time.monotonic(),
                seconds=time.monotonic() - began,
                shapes=[list(batch["input_ids"].shape) for batch in self._batches],
                graphs=self._step is not None,
                working_bytes=self._step.working_bytes if self._step else 0,
            )
        )

    def _make_ready(self, batch: Batch) -> None:
        if self._step is not None:
            self._step.record(batch, self._watch)
            return
        batch = {name: tensor.to(self._model.device) for name, tensor in batch.items()}
        # the backward of all layers is run for those of the first, and no other gradient is held: all of them together
        # can be more than training ever holds, where weights are updated within the backward
        parameters = trained_parameters(decoder_layers(self._model)[0]) or trained_parameters(self._model)
        once = torch.ones((), device=self._model.device)
        run = functools.partial(forward_and_backward, self._forward, self._autocast, batch, parameters, once)
        run()
        self._watch(run)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Report replays and late compilations."""
        if not self._compiles:
            return
        later = compilations() - self._compiled
        if later:
            text = f"torch compiled {later} times more while training ran: some steps were slow for it"
            self._emit(Warned(t=time.monotonic(), text=text))
        replays, unrecorded = (self._step.replays, self._step.unrecorded) if self._step else (0, 0)
        self._emit(EngineDone(t=time.monotonic(), replays=replays, unrecorded=unrecorded, compilations=later))

    def ran(self) -> dict[str, str]:
        """Read from the live model what really runs: facts by name, as in readback."""
        return {
            "engine": engine_of(self._model, self._step).value,
            "chunked_loss": str(loss_is_chunked(self._model)),
            "mlp_tile": str(mlp_tile_of(self._model)),
        }

    def _watch(self, run: Callable[[], object]) -> None:
        self._attention.seen = kernels_of(run) | (self._attention.seen or frozenset())

    def _warn_unrecorded(self, shape: tuple[int, ...]) -> None:
        if shape not in self._warned:
            self._warned.add(shape)
            text = f"a batch of {' x '.join(map(str, shape))} was not recorded: it runs operation by operation, slowly"
            self._emit(Warned(t=time.monotonic(), text=text))


def shapes(config: TrialConfig, examples: Sequence[Example], collator: Collator) -> list[Batch]:
    """Make a batch of every shape that training can bring, longest rows first; the content does not matter."""
    if config.engine.kind not in (EngineKind.compile, EngineKind.graph):
        return []
    by_size = {size: place for place, size in enumerate(sizes_of(examples))}
    by_width = {collator.width_of([example]): example for example in map(examples.__getitem__, by_size.values())}
    return [tensors(collator([by_width[width]] * config.batch_size)) for width in sorted(by_width, reverse=True)]


def checkpoints_by_trainer(config: TrialConfig) -> bool:
    """Return whether Trainer's own arguments switch checkpointing on."""
    # around or within compiled code, by the version of transformers: the engine does it there
    is_compiled = config.engine.kind in (EngineKind.compile, EngineKind.graph)
    return not is_compiled and config.gradient_checkpointing in (Checkpointing.full, Checkpointing.selective)


def _checkpoint(config: TrialConfig, model: Any) -> None:
    """Checkpoint the layers, where Trainer does not."""
    mode, layers = config.gradient_checkpointing, decoder_layers(model)
    # a CUDA graph can't keep random state, and has no dropout then
    keeps = config.engine.kind is not EngineKind.graph
    within = config.engine.compiles_whole_layers
    if mode is Checkpointing.offloaded:
        offload_checkpoints(layers, model.device, keeps, within)
    elif mode is not Checkpointing.none and not checkpoints_by_trainer(config):
        checkpoint_layers(layers[:: 2 if mode is Checkpointing.selective else 1], keeps, within)


def _settle_masks(config: TrialConfig, model: Any) -> None:
    if config.attention is not Attention.sdpa:
        return
    packed = config.data.batching is Batching.packed
    never = not packed and needs_no_mask(model.config.get_text_config(), config.seq_len)
    (leave_out_masks if never else always_mask)(model)
    if attention_of(model)[1] == AS_NEEDED:
        raise Unsupported(
            f"{type(base_of(model)).__name__} can't change its attention, so its masks depend on each batch. "
            "Use engine=eager."
        )
