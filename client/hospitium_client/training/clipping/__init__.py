"""Clipped sums of per-unit gradients: the one place where a patient's influence is bounded."""
