"""`python -m apps.fill`."""

from apps.common.cli import main
from apps.fill.run import APP

raise SystemExit(main(APP))
