"""Segmentation networks with hooks for tuning methods, and loading their weights."""
