"""Pictures that follow edges or depth."""
