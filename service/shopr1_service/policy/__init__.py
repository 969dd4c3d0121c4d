"""The policy: model, tokenizer, adapters, versions."""
