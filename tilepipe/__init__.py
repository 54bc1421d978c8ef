"""Exact tiled segmentation of images too large for memory."""

__version__ = "0.1.0"
