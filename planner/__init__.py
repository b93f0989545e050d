"""Predicts what a step costs from measured curves, and searches for the plan that costs least."""
