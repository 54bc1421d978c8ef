"""Exact tiled segmentation of images too large for memory.

``tilepipe.segment("volume.zarr", model="unet.pt")`` gives, for an image of any size, the answer
of one pass of the network over the whole mirrored image. Nothing heavy is imported until it is
used.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
