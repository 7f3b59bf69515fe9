"""``python -m fairseq_hyperrouter.commands``, the same as ``fairseq-hyperrouter``."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
