"""Launchers of the C++ kernels, one file per family; names are those of the operations."""

from deaddir_fast.ops._cpu.curvature import directional_curvature

__all__ = ["directional_curvature"]
