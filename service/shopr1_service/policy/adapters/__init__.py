"""LoRA adapters: their config, their weights, and the base they were trained on."""
