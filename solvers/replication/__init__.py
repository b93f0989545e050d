"""Experts in several copies: how many, where, and which share of the tokens each takes; beside it EPLB's rule."""
