"""``python -m speciarl_jax.cli``."""

import sys

from speciarl_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
