"""Evaluation: how well a prediction agrees with labels, block by block.

Others use `evaluate` (the story) and `scores` (what the numbers mean). Knows volumes and instances;
never torch or Dask.
"""
