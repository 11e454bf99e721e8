"""`python -m apps.depth_canny`."""

from apps.common.cli import main
from apps.depth_canny.run import APP

raise SystemExit(main(APP))
