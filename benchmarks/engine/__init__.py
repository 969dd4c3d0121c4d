"""The engine against full logits and `logits_to_keep`: speed, memory, accuracy."""
