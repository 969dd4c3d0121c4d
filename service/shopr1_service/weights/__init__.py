"""Weights from checkpoints, uploads and broadcasts, checked before they are loaded."""
