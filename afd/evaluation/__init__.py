"""Measures of finished videos against a known truth, and their report."""
