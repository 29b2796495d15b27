"""The embedded CLIPSeg, the demo data set, and what made them."""
