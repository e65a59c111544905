"""Lowering: from a native model to one that only evaluates."""
