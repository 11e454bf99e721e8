"""Text to image with SANA."""
