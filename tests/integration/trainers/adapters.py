"""LoRA adapters of the embedded policy."""

import json
from pathlib import Path

import numpy as np
import safetensors.numpy

HIDDEN_SIZE = 576
"""Width of the embedded policy, SmolLM2-135M."""


def save_adapter(directory: Path) -> Path:
    """A LoRA adapter of rank 1 for one layer, as PEFT saves it."""
    directory.mkdir()
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{prefix}.lora_A.weight": np.full((1, HIDDEN_SIZE), 0.1, np.float32),
        f"{prefix}.lora_B.weight": np.full((HIDDEN_SIZE, 1), 0.1, np.float32),
    }
    safetensors.numpy.save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory
