"""Small things that need nothing of the lab: errors, the console, files, YAML, processes, plots.

Imports the standard library and light packages alone, never torch at import.
"""
