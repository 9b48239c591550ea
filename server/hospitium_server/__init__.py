"""The coordinator's side: rounds, unmasking, aggregation, models, reports."""
