"""Scores of answers and what they mean: published scorers, intervals, tests."""
