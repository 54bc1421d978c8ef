"""Models: model files, what tiling must know of them, and running them on a device.

Others use `model` (load a file), `checkpoint` (our own file), `unet` (the network of
arXiv:1505.04597), `spec` (context, step, sizes and what forbids tiling), `predictor` (run it),
`device`, `cost`, `windows`, `rehearsal` and `process_memory`. Knows networks and devices; never
volumes, Zarr or Dask.
"""
