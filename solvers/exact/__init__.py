"""Placements solved exactly, at small sizes: integer programs on HiGHS, CP-SAT, paths through arrangements."""
