"""Turns published data sets, in the formats in which people have them, into data directories."""
