"""The subcommands: each module adds its own to the command line, and imports a stage's code when it runs."""
