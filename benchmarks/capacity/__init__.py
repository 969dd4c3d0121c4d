"""A simulation of 1 to 256 engines on a recorded trace with measured costs; see README.md there."""
