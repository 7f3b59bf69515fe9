"""A user's mistakes, found before anything is built.

data_folder.py           what lies in DATA
stock_options.py         stock fairseq's own options
moe_options.py           ours beside the model's, the task's and the criterion's
distributed_options.py   combinations of workers that cannot work
checkpoint_file.py       the file that a training goes on from; one that a kill cut short is replaced
same_model.py            whether that is of this model

What the options of this package say by themselves is checked by ``MoEConfig.check`` in config.py.
"""
