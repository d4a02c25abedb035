"""The subcommands of `afd`, a module per topic: each has `add_to(commands)`, and imports what it runs when it runs."""
