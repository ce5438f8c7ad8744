"""From an image file to a batch on the device."""
