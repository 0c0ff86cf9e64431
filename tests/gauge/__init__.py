"""Symmetry groups: discovery, action, orbit tangents, quotient."""
