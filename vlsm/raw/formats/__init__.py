"""Formats of annotation tools and volumes: one file each, read by `datasets.py --import`."""
