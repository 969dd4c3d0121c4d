"""Self-certainty of token ids: forward strategies, head, prefix cache. Knows no text and no HTTP."""
