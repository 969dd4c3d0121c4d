"""The protocols of trainers that send HTTP themselves: thin routes over the one way to score.

The paths are `/dialects/<trainer>/<route>`, with the route that the trainer's own server has.
"""
