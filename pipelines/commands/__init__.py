"""Commands of `fadeformer`, a module each: `add_arguments(parser)`, and `run(arguments)`, which gives its summary."""
