"""Answers of a routed model: generation, reports, the HTTP endpoint."""
