"""Does the search find what was planted? Networks changed by updates of known size, and data from the changed ones."""
