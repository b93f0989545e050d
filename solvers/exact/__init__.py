"""Placements solved exactly, at small sizes: copies by integer programs, single ones by paths through arrangements."""
