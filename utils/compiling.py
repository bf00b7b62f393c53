"""Options of torch.compile for what has a gradient."""

# torch 2.10 to 2.13 make one Triton kernel of reductions over rows and over columns, and leave parts of a modulation
# table's gradient unwritten (pytorch/pytorch issue 193061, found on Wan): what was there before passes for a gradient.
TRAINED = {"triton.mix_order_reduction": False}
