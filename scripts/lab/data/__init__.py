"""Pictures on their way from a file to the device: data sets, augmentation, loading, packing,
caches.

Imports `base`, `config` and `machine`.
"""
