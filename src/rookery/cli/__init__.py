"""The `rookery` command: one file per verb. A verb parses, calls the library and prints; it decides nothing else."""
