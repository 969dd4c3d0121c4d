"""Reward functions for trainers that call Python, a file for each; docs/trainers/ has the lines to paste.

The environment configures the service, see `settings.py`. `callback.py` sends new weights to it.
"""
