"""`python -m shards` is `bigtrain-shards`."""

import sys

from shards.shards_cli import main

if __name__ == "__main__":
    sys.exit(main())
