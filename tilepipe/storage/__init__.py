"""Storage: where things lie, on a file system or in an object store, under one set of verbs.

Others use `location` (paths and addresses), `objects` (what only object stores have), `guarded` (a
Zarr store that asks before each write) and `contents` (every name that an output may hold). Knows
addresses, bytes and how a Zarr store is opened; never images, networks, plans or engines.
"""
