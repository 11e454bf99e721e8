"""Variations and mixes of pictures."""
