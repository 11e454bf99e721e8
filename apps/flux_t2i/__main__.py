"""`python -m apps.flux_t2i`."""

from apps.common.cli import main
from apps.flux_t2i.run import APP

raise SystemExit(main(APP))
