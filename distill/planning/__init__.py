"""Planning: memory, time and cost of a run on a slice of chips, before it starts."""
