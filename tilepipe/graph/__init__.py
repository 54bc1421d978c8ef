"""Graph: a network as a graph of operations, computed region by region or slab by slab.

Others use `graph` (export and walk), `bounds` (which rows a region needs), `evaluator` (one
region), `sweep` (the whole image in slabs), `footprint` (the memory of a sweep), `meaning` (what
the values are) and `readings` (`NoRule`). Knows torch and index arithmetic; never files, Zarr or
Dask.
"""
