"""What the four subcommands do: the only code that wires teachers, objectives, trainer, store and metrics together."""
