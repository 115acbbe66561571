# SPDX-License-Identifier: MIT
"""Era 0.17: `natten.na3d` as a module, with the class of that time.

From 0.20 on `natten.na3d` is a function. Python binds a submodule to the name of the package once it is imported, so
what stands in `sys.modules` under this name is the function; it has the class for an attribute.
"""

import sys

from .functional import na3d
from .legacy_modules import NeighborhoodAttention3DOf017

na3d.NeighborhoodAttention3D = NeighborhoodAttention3DOf017
na3d.__spec__ = __spec__  # what importlib asks of everything in sys.modules
sys.modules[__name__] = na3d
