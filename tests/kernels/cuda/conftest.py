from cuda_emulator import emulator  # noqa: F401
