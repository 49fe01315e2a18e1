"""Measurements: run by hand, never in tests."""
