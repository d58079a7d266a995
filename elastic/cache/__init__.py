"""Keys and values of a generation, and decoding over them."""
