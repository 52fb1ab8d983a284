"""What a run will need on a slice of chips."""
