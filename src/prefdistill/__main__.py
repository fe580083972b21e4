"""`python -m prefdistill`."""

import sys

from prefdistill.cli import main

sys.exit(main())
