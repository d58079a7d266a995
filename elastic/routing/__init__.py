"""Keys to a decision, and the ratios of decisions."""
