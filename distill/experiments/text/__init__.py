"""A student distilled on text from a published teacher."""
