// tab::linear_fwd and tab::linear_bwd on the CPU.
