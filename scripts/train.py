"""Trains a segmentation model on category words alone, or on images, as `ifseg tune`.

accelerate launch scripts/train.py --categories "cat, coffee" --output-dir OUT
accelerate launch scripts/train.py --config scripts/configs/ade20k.yaml
"""

import sys

from ifseg_hf.cli.main import script

main = script("tune", __file__)

if __name__ == "__main__":
    sys.exit(main())
