"""Evaluation: judged samples, the table with intervals, and the report."""
