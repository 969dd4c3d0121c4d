"""Protocols of trainers that send HTTP themselves, as thin routes over `http/scoring.py`.

Their paths are `/dialects/<trainer>/<route>`, with the route of the trainer's own server. Two modules
differ: `labels.py` (`/labels`) stores the human's actions for trainers that cannot send them along, and
`engine_api.py` answers the routes of SGLang and vLLM for weight updates.
"""
