"""``python -m guilomo.cli``, for when the console script is not on the path."""

from guilomo.cli import main

raise SystemExit(main())
