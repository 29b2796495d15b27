"""Files, processes, the console, devices, charts: code that needs no images or networks."""
