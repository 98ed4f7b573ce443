"""How each stack builds its model and its Trainer. Imported in a contender's process only."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.peers.plan import (
    ALPHA,
    LEARNING_RATE,
    LINEAR_LAYERS,
    MAX_GRAD_NORM,
    OTHER_KERNEL,
    RANK,
    SEED,
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
    as_row: Callable[[dict[str, Any]], Any] = lambda row: row
    """Turns a shared row (input_ids, attention_mask, labels) into what this stack's collator takes."""
    release: Callable[[], None] = lambda: None
    """Gives back, at the end of a turn, memory that would else be held while others take theirs."""
    unseen_peak_bytes: Callable[[], int] = lambda: 0
    """Most bytes in use in a step, where torch's allocator does not see them: within a CUDA graph."""


def build(setup: Setup, device: str) -> Built:
    """The contender, loaded onto `device` (cuda or cpu)."""
    if setup.contender in ("plain", "liger", OTHER_KERNEL):
        return _hugging_face(setup, device)
    if setup.contender == "unsloth":
        return _unsloth(setup)
    from benchmarks.peers import own

    return own.build(setup, device)


def _hugging_face(setup: Setup, device: str) -> Built:
    """Plain Hugging Face as its tutorials have it, with or without Liger's kernels."""
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
    if setup.method == "qlora":
        model = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=setup.cell.checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
    model = get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(LINEAR_LAYERS)
        ),
    )
    checkpointing = {
        "gradient_checkpointing": setup.cell.checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if setup.cell.checkpointing else None,
        "use_liger_kernel": setup.contender == "liger",
    }
    return Built(model, lambda job: _trainer(setup, model, job, device, **checkpointing))


def _unsloth(setup: Setup) -> Built:
    """Unsloth as its notebooks have it, with transformers' Trainer, which it patches. Needs a GPU.

    It patches transformers, peft and trl while it is imported, so that comes before them.
    """
    unsloth: Any = importlib.import_module("unsloth")
    import torch

    checkpointing: str | bool = "unsloth" if setup.cell.checkpointing else False
    model, _tokenizer = unsloth.FastLanguageModel.from_pretrained(
        model_name=f"{setup.material}/model",
        max_seq_length=setup.cell.seq_len,
        dtype=torch.bfloat16,
        load_in_4bit=setup.method == "qlora",
        load_in_16bit=setup.method == "lora",
        use_gradient_checkpointing=checkpointing,
        use_exact_model_name=True,  # never another, prequantised model in its place
        local_files_only=True,
    )
    model = unsloth.FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        target_modules=list(LINEAR_LAYERS),
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        bias="none",
        use_gradient_checkpointing=checkpointing,
        random_state=SEED,
    )

    def make_trainer(job: Job) -> Any:
        # what Unsloth's own trainers do before each train()
        unsloth.FastLanguageModel.for_training(model, use_gradient_checkpointing=checkpointing)
        # gradient_checkpointing stays out of the arguments: the model has Unsloth's own switched on
        return _trainer(setup, model, job, "cuda")

    return Built(model, make_trainer)


def _trainer(setup: Setup, model: Any, job: Job, device: str, **further: Any) -> Any:
    """transformers' Trainer with the settings that all contenders share."""
    from transformers import Trainer, TrainingArguments, default_data_collator

    arguments = TrainingArguments(
        output_dir=job.folder,
        max_steps=job.steps,
        per_device_train_batch_size=setup.cell.batch_size,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=MAX_GRAD_NORM,
        optim="adamw_torch_fused",
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
        data_collator=default_data_collator,
        train_dataset=job.rows,
        callbacks=[job.callback],
    )
