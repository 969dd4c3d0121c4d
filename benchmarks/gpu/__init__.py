"""Correctness and speed on a CUDA device, in one run without a network; see README.md there."""
