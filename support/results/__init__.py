"""Scores, their statistics, and pictures."""
