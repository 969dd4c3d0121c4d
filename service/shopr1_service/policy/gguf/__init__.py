"""Parts of GGUF files that transformers leaves out: config, tensors, pre-tokenizers."""
