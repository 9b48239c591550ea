"""Data at a site: read, checked, split by patient, and made ready for a model."""
