"""The command `haste`: one module per subcommand."""
