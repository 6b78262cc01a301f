"""The data plane: packing, mixing, planning, tokenisation."""
