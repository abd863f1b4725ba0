"""Exports a model to ONNX, as `ifseg export`.

python scripts/export_onnx.py tuned model.onnx
"""

import sys

from ifseg_hf.cli.main import script

main = script("export", __file__)

if __name__ == "__main__":
    sys.exit(main())
