"""lora_lab: measured LoRA and QLoRA fine-tuning on the card you own."""

__version__ = "0.1.0"
