"""Pixels, masks and prompts: reading, caching, choosing, augmenting."""
