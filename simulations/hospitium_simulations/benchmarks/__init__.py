"""What Hospitium costs, measured against the fastest ordinary way."""
