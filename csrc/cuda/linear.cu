// tab_cuda::linear_fwd and tab_cuda::linear_bwd.
