"""`python -m apps.flux_t2i`."""

from apps.flux_t2i.run import main

raise SystemExit(main())
