"""The command `ifseg`, whose sub-commands are also the scripts of the repository.

Importing it loads neither torch nor transformers: a command imports them once its arguments are read.
"""

import os

# OpenMP's threads sleep while they wait for each other. By default they spin, and where other programs take some of the
# cores, a training step then takes many times as long. OpenMP reads this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
