# SPDX-License-Identifier: MIT
# NOTE: clients of the original branch on `< 0.20` and `>= 0.21.5`; the build reads this file too.
__version__ = "0.22.0"
