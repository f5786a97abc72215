b1_kernel = None
