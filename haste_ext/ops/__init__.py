"""What a user calls: for each operation its docstring, checks, fake kernel and autograd."""
