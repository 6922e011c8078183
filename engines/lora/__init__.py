"""LoRA on engines."""
