"""Volumes: the images that are read and the OME-Zarr that is written.

Others use `volume` (open and read), `source` (the source of a run, opened as its options ask),
`borders` (regions that reach outside), `output` (where an output lies; it is created and opened
there), `normalize` (grey values from the whole volume), `cache`, `synthetic` and `overlay`. Knows
formats, axes, voxel sizes and channels; never torch or Dask.
"""
