"""Labels images with a model, as a dataset for `train.py --stage self-training`; as `ifseg pseudo-label`.

accelerate launch scripts/pseudo_label.py --model TUNED --images IMAGES --categories "cat, grass" --output-dir LABELS
"""

import sys

from ifseg_hf.cli.main import script

main = script("pseudo-label", __file__)

if __name__ == "__main__":
    sys.exit(main())
