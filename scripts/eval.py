"""Measures the mean IoU of a model on images with masks, as `ifseg evaluate`.

accelerate launch scripts/eval.py --model tuned --dataset CAMVID
"""

import sys

from ifseg_hf.cli.main import script

main = script("evaluate", __file__)

if __name__ == "__main__":
    sys.exit(main())
