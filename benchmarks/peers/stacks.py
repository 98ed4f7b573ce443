"""How each stack builds its model and its Trainer. Imported in a contender's process only."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.peers.plan import (
    ALPHA,
    LEARNING_RATE,
    LINEAR_LAYERS,
    MAX_GRAD_NORM,
    OTHER_KERNEL,
    SEED,
    TUTORIAL,
    UNSLOTH,
    UNSLOTH_LEAN,
    UNSLOTH_NO_CHECKPOINTING,
    UNSLOTH_TILED,
    Cell,
    Setup,
)


@dataclass(frozen=True)
class Job:
    """What a Trainer is made for."""

    rows: Any
    """A sized sequence of rows in order, as many as the steps take; see material.InOrder."""
    steps: int
    callback: Any
    folder: str
    """Trainer's output folder; nothing is written there."""


@dataclass(frozen=True)
class Built:
    """A loaded contender."""

    model: Any
    make_trainer: Callable[[Job], Any]
    attention: str
    """Who calculates attention, in the stack's own word."""
    as_row: Callable[[Any], Any]
    """Turns a shared row, an Example, into what this stack's collator takes."""
    release: Callable[[], None] = lambda: None
    """Gives back, at the end of a turn, memory that would otherwise be held during others' turns."""
    unseen_peak_bytes: Callable[[], int] = lambda: 0
    """Most bytes in use in a step, where torch's allocator does not see them: within a CUDA graph."""


def build(setup: Setup, device: str) -> Built:
    """Load the contender onto `device` (cuda or cpu)."""
    if setup.contender in ("plain", TUTORIAL, "liger", OTHER_KERNEL):
        return _hugging_face(setup, device)
    if setup.contender in (UNSLOTH, UNSLOTH_LEAN, UNSLOTH_TILED, UNSLOTH_NO_CHECKPOINTING):
        return _unsloth(setup)
    from benchmarks.peers import own

    return own.build(setup, device)


def _hugging_face(setup: Setup, device: str) -> Built:
    """Build transformers and PEFT as they come, with or without the tutorials' raising to fp32 or Liger's kernels."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        f"{setup.material}/model",
        dtype=torch.bfloat16,
        device_map={"": device},
        attn_implementation="eager" if setup.contender == OTHER_KERNEL else "sdpa",
        quantization_config=quantization if setup.method == "qlora" else None,
    )
    model.config.use_cache = False
    # checkpoints without re-entrance need no gradient of the embeddings' output
    checkpointing = {"use_reentrant": False} if setup.cell.checkpointing else None
    if setup.contender == TUTORIAL:
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=setup.cell.checkpointing, gradient_checkpointing_kwargs=checkpointing
        )
    model = get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM", r=setup.rank, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(LINEAR_LAYERS)
        ),
    )
    further = {
        "gradient_checkpointing": setup.cell.checkpointing,
        "gradient_checkpointing_kwargs": checkpointing,
        "use_liger_kernel": setup.contender == "liger",
    }
    return Built(
        model,
        lambda job: _trainer(setup, model, job, device, **further),
        model.config._attn_implementation,
        lambda example: tensors(example, setup.cell),
    )


def _unsloth(setup: Setup) -> Built:
    """Build Unsloth as its notebooks have it, with transformers' Trainer, which it patches. Needs a GPU.

    It patches transformers, peft and trl while it is imported, so that comes before them.
    """
    unsloth: Any = importlib.import_module("unsloth")
    import torch

    checkpointing: str | bool = False if setup.contender == UNSLOTH_NO_CHECKPOINTING else "unsloth"
    lean = {"offload_embedding": True} if setup.contender in (UNSLOTH_LEAN, UNSLOTH_TILED) else {}
    lean |= {"unsloth_tiled_mlp": True} if setup.contender == UNSLOTH_TILED else {}
    model, _tokenizer = unsloth.FastLanguageModel.from_pretrained(
        model_name=f"{setup.material}/model",
        max_seq_length=setup.cell.seq_len,
        dtype=torch.bfloat16,
        load_in_4bit=setup.method == "qlora",
        load_in_16bit=setup.method == "lora",
        use_gradient_checkpointing=checkpointing,
        use_exact_model_name=True,  # never another, prequantised model instead
        local_files_only=True,
        **lean,
    )
    model = unsloth.FastLanguageModel.get_peft_model(
        model,
        r=setup.rank,
        target_modules=list(LINEAR_LAYERS),
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        bias="none",
        use_gradient_checkpointing=checkpointing,
        random_state=SEED,
    )
    packed = setup.cell.packed

    def make_trainer(job: Job) -> Any:
        # what Unsloth's own trainers do before each train()
        unsloth.FastLanguageModel.for_training(model, use_gradient_checkpointing=checkpointing)
        # gradient_checkpointing stays out of the arguments: the model has Unsloth's own switched on
        return _trainer(setup, model, job, "cuda", collator=end_to_end if packed else None)

    as_row = (lambda example: example) if packed else (lambda example: tensors(example, setup.cell))
    return Built(model, make_trainer, _unsloth_attention(packed), as_row)


def _unsloth_attention(packed: bool) -> str:
    """Return what Unsloth chooses: flash_dense, flash_varlen, xformers or sdpa."""
    try:
        dispatch = importlib.import_module("unsloth.utils.attention_dispatch")
        return str(dispatch.select_attention_backend(packed))
    except (ImportError, AttributeError) as error:  # its inner modules may move
        return f"unknown: {error}"


def tensors(example: Any, cell: Cell) -> dict[str, Any]:
    """Return a row for transformers' default collator; a packed one has position_ids that start again per document."""
    from lora_lab.worker.data import Collator

    batch = Collator(pad_id=0, widths=(cell.seq_len,), packed=cell.packed)([example])
    return {name: value[0] for name, value in batch.items() if name != "counts"}  # type: ignore[index]


def end_to_end(examples: Sequence[Any]) -> dict[str, Any]:
    """Return the batch as one row without padding, and the documents' lengths: what Unsloth's trainers make of packed
    rows (unsloth/utils/packing.py)."""
    import torch

    lengths = [length for example in examples for length in example.document_lengths]
    return {
        "input_ids": torch.tensor([[token for example in examples for token in example.ids]]),
        "labels": torch.tensor([[label for example in examples for label in example.labels]]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "packed_seq_lengths": torch.tensor(lengths, dtype=torch.int32),
    }


def _trainer(setup: Setup, model: Any, job: Job, device: str, collator: Any = None, **further: Any) -> Any:
    """Make transformers' Trainer with the settings that all contenders share."""
    from transformers import Trainer, TrainingArguments, default_data_collator

    arguments = TrainingArguments(
        output_dir=job.folder,
        max_steps=job.steps,
        per_device_train_batch_size=setup.cell.batch_size,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=MAX_GRAD_NORM,
        optim=setup.optim,
        bf16=True,
        use_cpu=device == "cpu",
        dataloader_pin_memory=device == "cuda",
        dataloader_drop_last=True,
        remove_unused_columns=False,
        seed=SEED,
        data_seed=SEED,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        logging_nan_inf_filter=False,  # it synchronises to look
        **further,
    )
    return Trainer(
        model=model,
        args=arguments,
        data_collator=collator or default_data_collator,
        train_dataset=job.rows,
        callbacks=[job.callback],
    )
