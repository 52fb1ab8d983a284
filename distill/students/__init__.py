"""A student from its teacher: where it starts, and what of it is learnt."""
