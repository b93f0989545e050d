"""From recorded routing to an expert placement: samples of it, the solvers' answer, its scores and its bound."""
