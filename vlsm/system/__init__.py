"""Files, processes, the console, devices: what knows nothing of images or networks."""
