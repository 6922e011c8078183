"""The ground floor: errors in words, files, outputs, contracts and numbers, console, child processes."""
