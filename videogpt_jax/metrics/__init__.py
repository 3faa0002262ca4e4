"""Measures of predicted video."""
