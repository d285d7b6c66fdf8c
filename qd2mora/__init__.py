"""Low-memory fine-tuning of 4-bit LLaMA models with mixtures of LoRA."""
