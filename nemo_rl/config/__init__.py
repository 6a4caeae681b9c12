"""From YAML and a command line to a frozen, validated configuration; imports neither torch nor ray."""
