"""The subcommands of `splitserve`, each with its arguments and its `run`."""
