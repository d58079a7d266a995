"""Published methods that choose key blocks, a file each: the rule from the paper's equations, its readable oracle, and
the same choice in PyTorch on any device. `elastic.attention.selection.table` lists them.
"""
