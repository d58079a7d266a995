"""Published methods that choose key blocks, a file each: the rule from the paper's equations, its readable oracle, and
the same choice in PyTorch on any device, whose slowest steps are kernels on a GPU (`elastic.kernels.block_choice`).
`elastic.attention.selection.table` lists them.
"""
