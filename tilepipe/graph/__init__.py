"""Graph: a network as a graph of operations, computed region by region or slab by slab.

What each operation is, one table says: `operations`. Its rows name functions of `readers` (which
rows are read), `computing` (how a region is computed) and `values` (what is known of the values).

Others use `graph` (export and walk), `bounds` (which rows a region needs), `evaluator` (one
region), `sweep` (the whole image in slabs), `footprint` (the memory of a sweep), `meaning` (what
the values are) and `readings` (`NoRule`). Knows torch and index arithmetic; never files, Zarr or
Dask.
"""
