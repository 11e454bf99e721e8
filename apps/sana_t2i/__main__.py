"""`python -m apps.sana_t2i`."""

from apps.common.cli import main
from apps.sana_t2i.run import APP

raise SystemExit(main(APP))
