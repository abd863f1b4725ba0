"""Serves the page in which images are segmented into typed words, as `ifseg app`.

python scripts/app.py --open
"""

import sys

from ifseg_hf.cli.main import script

main = script("app", __file__)

if __name__ == "__main__":
    sys.exit(main())
