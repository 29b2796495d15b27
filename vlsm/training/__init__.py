"""A training run: its options, its state and folder, and the cache of frozen encoders' output."""
