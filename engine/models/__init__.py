"""What each model family needs: where it lives, which leaves are replaced, its defaults."""
