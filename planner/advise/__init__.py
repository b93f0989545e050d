"""Does balancing pay: what a placement gains on recorded routing, what moving costs, and how sure that is."""
