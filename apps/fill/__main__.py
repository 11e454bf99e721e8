"""`python -m apps.fill`."""

from apps.fill.run import main

raise SystemExit(main())
