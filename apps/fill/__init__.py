"""Parts of a picture painted anew, or what lies around it."""

TASKS = ("Paint over a part", "Widen the picture")
# Where a picture that is widened lies on its page.
SIDES = ("Middle", "Left", "Right", "Top", "Bottom")
