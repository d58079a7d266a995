"""A stock transformers model becomes a routed one, and back."""
