"""Reward functions for trainers that call Python. One file each; docs/trainers/ has the lines to paste.

Where the service is comes from the environment: `SHOPR1_CLIENT_URL` (several with commas between),
`SHOPR1_CLIENT_API_KEY`, `SHOPR1_CLIENT_RECIPE`, `SHOPR1_CLIENT_UNSCORABLE`, `SHOPR1_CLIENT_RUN`,
`SHOPR1_CLIENT_DEMAND`. See `service.py`. `callback.py` sends new weights there.
"""
