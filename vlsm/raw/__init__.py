"""Raw downloads, as their publishers ship them, into the layout that `datasets.py` knows."""
