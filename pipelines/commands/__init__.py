"""The commands of `fadeformer`, one module each: `add_arguments(parser)`, and `run(arguments)` to its summary."""
