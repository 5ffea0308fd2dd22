"""Generated from splitserve.proto by `make proto`."""
