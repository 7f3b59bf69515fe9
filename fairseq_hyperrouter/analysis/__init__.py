"""What a trained model costs and does: numbers first, pictures from the numbers.

observation.py   a look inside a model while it is evaluated
cost.py          parameters and operations
measures.py      similarities, ranks and the like, of tensors
machine.py       where numbers were made
table.py         tables of them as Markdown
row.py           what an evaluation came to
pictures.py      pictures of numbers                                     row
evaluation.py    the loss of a checkpoint at any number of experts       observation, cost, row
seen.py          what a layer made of tokens, kept for later
layer_numbers.py the numbers of one MoE layer                           measures, seen
validation.py    those that a training logs when it validates           observation, layer_numbers, seen, measures
inspection.py    those of a checkpoint on a text                        evaluation, observation, layer_numbers, seen
layer_table.py   that as a table
page.py          that as an HTML page                                    inspection, layer_numbers, layer_table
allocation.py    fairseq-hyperrouter allocate                            evaluation, row
sweep.py         fairseq-hyperrouter sweep                               evaluation, row, table, pictures
report.py        fairseq-hyperrouter report                              evaluation, inspection, page, ...

On the right: which of the others a module imports, always from above it.
"""
