"""Self-certainty from hidden states on CUDA, without reading the logits several times."""
