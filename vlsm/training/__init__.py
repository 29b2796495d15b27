"""A training run: its options, its state, its folder, what is kept of frozen encoders."""
