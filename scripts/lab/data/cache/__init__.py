"""`dataset.cache`: pictures that were decoded once, on the training device or in a file on a disk.

A part of `data`; imports what `data` may.
"""
