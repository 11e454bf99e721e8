"""Pictures from line drawings."""

# How an uploaded picture becomes lines.
READINGS = ("Decide by itself", "It is a drawing", "It is a photo: find its lines")
