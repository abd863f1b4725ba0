"""Publishes a saved model on the Hub, with its processor, code and model card, as `ifseg push`.

python scripts/push_to_hub.py tuned me/my-words
"""

import sys

from ifseg_hf.cli.main import script

main = script("push", __file__)

if __name__ == "__main__":
    sys.exit(main())
