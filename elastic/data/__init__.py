"""Text and records to packed batches: what routers are trained and judged on."""
