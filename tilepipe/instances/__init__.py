"""Instances: objects of a segmentation, numbered and grown block by block.

Others use `components` (number the connected parts of a mask), `growth` (grow them until they meet)
and `blocks`. Knows volumes and outputs; never torch or Dask.
"""
