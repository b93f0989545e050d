"""How good a placement can be: proven lower bounds on crossings and on the hottest device."""
