"""What keeps files and processes whole: how files are published, how those of others are read, what is started, what is kept out of logs."""
