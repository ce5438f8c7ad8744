"""Networks by name, on the device, averaged, scored by a small proxy; their weights in and out.

Imports the rooms before it: `base`, `config`, `machine`, `data` and `method`.
"""
