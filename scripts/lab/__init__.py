"""What no idea depends on: config, files, data, processes, analysis. Never imports train_ast or a command."""
