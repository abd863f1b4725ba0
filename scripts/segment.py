"""Segments images into words, as `ifseg segment --no-tune`, and never tunes.

python scripts/segment.py cat.jpg --model tuned --output-dir out
"""

import sys

from ifseg_hf.cli.main import script

main = script("segment", __file__, "--no-tune")

if __name__ == "__main__":
    sys.exit(main())
