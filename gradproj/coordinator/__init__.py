"""The protocol by which processes claim, commit and merge units. See README.md."""
