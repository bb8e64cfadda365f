"""The `fadeformer` command: one module per subcommand, with `add_arguments(parser)` and `run(arguments)`."""
