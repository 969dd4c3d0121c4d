"""Reward functions for trainers that call Python, a file for each; docs/trainers/ has the lines to paste.

The environment configures the service: `SHOPR1_CLIENT_URL` (several separated by commas),
`SHOPR1_CLIENT_API_KEY`, `SHOPR1_CLIENT_RECIPE`, `SHOPR1_CLIENT_UNSCORABLE`, `SHOPR1_CLIENT_RUN`,
`SHOPR1_CLIENT_DEMAND`; see `service.py`. `callback.py` sends new weights to it.
"""
