"""Evaluation on lm-evaluation-harness: a routed model for it, RULER and LongBench, results."""
