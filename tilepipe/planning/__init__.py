"""Planning: all that is decided before the first voxel is computed.

Others use `plan` (the decisions, and the reasons), `costs` and `tiling` (which sizes cost least),
`regions` (what parts of the graph cost), `activation` (what makes probabilities) and `identity`
(what the bytes of an output depend on). Reads files and touches nothing; never starts an engine.
"""
