"""Attention over a shared prefix."""
