"""`python -m apps.sketch`."""

from apps.common.cli import main
from apps.sketch.run import APP

raise SystemExit(main(APP))
