"""A user's mistakes, found before anything is built.

data_folder.py           what lies in DATA
stock_options.py         stock fairseq's own options
distributed_options.py   combinations of workers that cannot work
checkpoints.py           what lies in the checkpoint folder, and what it was made with

The options of this package check themselves: ``MoEConfig.check`` in config.py.
"""
