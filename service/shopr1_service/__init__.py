"""The Shop-R1 reward service: policy, engine, HTTP, command line."""

from importlib.metadata import version

__version__ = version("shopr1")
