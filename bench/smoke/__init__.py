"""Every Triton kernel once: is it right?"""
