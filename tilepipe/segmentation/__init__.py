"""Segmentation: the story of ``tilepipe segment``, from a request to a finished output.

Others use `segment` (the story, and `plan_segment`), `report` and `worker` (one tile, from source
to output, in whatever process). Knows everything below: planning, models, runs, engines and
volumes.
"""
