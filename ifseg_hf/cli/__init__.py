"""The command `ifseg`, whose sub-commands are also the scripts of the repository.

Importing it loads neither torch nor transformers: a command imports them once its arguments are read.
"""
