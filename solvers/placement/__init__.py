"""Where single copies go, for few crossings at a given balance: the problem, and its search by annealing."""
