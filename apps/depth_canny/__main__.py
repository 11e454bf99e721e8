"""`python -m apps.depth_canny`."""

from apps.depth_canny.run import main

raise SystemExit(main())
