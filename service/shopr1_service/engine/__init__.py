"""Exact self-certainty of token groups. Knows no text and no HTTP."""
