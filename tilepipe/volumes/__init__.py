"""Volumes: the images that are read and the OME-Zarr that is written.

Others use `volume` (open and read), `source` (the source of a run, opened as its options ask),
`output` (create and open what is written), `normalize` (grey values from the whole volume),
`cache`, `synthetic` and `overlay`. Knows formats, axes, voxel sizes and channels; never torch or
Dask.
"""
