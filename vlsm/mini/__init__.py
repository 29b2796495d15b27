"""The embedded CLIPSeg and the demo data set."""
