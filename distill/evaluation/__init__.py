"""How near a student is to its teacher."""
