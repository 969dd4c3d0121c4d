"""Prompts and completions as token ids: chat templates, tokenizer, end tokens."""
