"""Training: the story of ``tilepipe train``, from labelled volumes to a model file.

Others use `train` (the loop), `recipe` (its options), `targets` (the classes that labels
become) and `experiment` (all that is decided before the first step). Knows segmentation, which
judges the network on held-out regions.
"""
