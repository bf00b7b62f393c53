"""What ranks of the tests are forked from: imported once, and left alone by the garbage collectors of the ranks."""

import gc

import ranks_case

from configs.load import load_config

load_config(ranks_case.BASE)  # whatever is made once a process
gc.freeze()
