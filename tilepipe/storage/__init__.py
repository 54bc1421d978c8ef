"""Storage: where things lie, on a file system or in an object store, under one set of verbs.

Others use `location` (paths and addresses), `objects` (what only object stores have), `appending`
(files that only grow), `guarded` (a Zarr store that asks before each write), `names` (of all files
in an output) and `contents` (nothing but those is ever written to or removed). Knows
addresses, bytes and how a Zarr store is opened; never images, networks, plans or engines.
"""
