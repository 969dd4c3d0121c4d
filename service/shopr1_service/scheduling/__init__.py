"""The request queue and the engine thread."""
