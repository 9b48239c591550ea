"""HSA-1: the coordinator learns the sum over the cohort, and nothing about any one site."""
