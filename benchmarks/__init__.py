"""Benchmarks. Run each from the repository's root, as `python -m benchmarks.engine.bench`; see README.md."""
