"""Predictions corrected by a few measurements of the user's own."""
