"""`python -m apps.redux`."""

from apps.common.cli import main
from apps.redux.run import APP

raise SystemExit(main(APP))
