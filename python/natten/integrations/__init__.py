# SPDX-License-Identifier: MIT
"""Bridges to other libraries; each module needs the library of its name, and none is imported by the package."""
