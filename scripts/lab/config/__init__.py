"""Every config key, what a config needs of itself, and how a file, overrides and a grid become one.

Imports `base`. No torch at import: a table of results and a sweep read configs too.
"""
