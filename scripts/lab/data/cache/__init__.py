"""`dataset.cache`: pictures that were decoded once, on the training device or in a file on a disk.

A part of `data`; imports what `data` may.
"""

# Threads that read raw pixels from a file; JPEGs, which they also decode, may have more. On an
# H200's host with 16 cores 4, 8 and 16 gave 31,271, 29,642 and 23,960 pictures of 400 px a second,
# and ResNet-50 trains on some 7,000.
MOST_READERS = 8
