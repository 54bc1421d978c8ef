"""Runs: what a run of any tiled work leaves behind, and who may write.

Others use `ledger` (finished tiles, with their plan), `lease` (who writes), `fence` (whether a
process still may), `log` (when, where and how long) and `array` (one task of an array). Knows tiles
by their numbers; never what is computed in them.
"""
