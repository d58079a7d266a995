"""Evaluation on lm-evaluation-harness: methods by name, a routed model for it, RULER, results."""
