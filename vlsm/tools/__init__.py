"""Programs of their own: `python -m vlsm.tools.NAME`. Nothing imports them."""
