"""Parts of a picture painted anew."""
