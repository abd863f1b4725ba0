"""Converts a published OFA or IFSeg checkpoint to a folder that `from_pretrained` loads, as `ifseg convert`.

python scripts/convert_ofa.py OFA-Sys/ofa-base ofa-base
"""

import sys

from ifseg_hf.cli.main import script

main = script("convert", __file__)

if __name__ == "__main__":
    sys.exit(main())
