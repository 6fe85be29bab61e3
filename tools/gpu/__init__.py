"""What tools/gpu_check is made of: the plan of its stages, what runs them, what it writes, and the stages' programs."""
