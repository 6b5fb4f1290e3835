"""The command line: thin commands.

`app` holds the commands, `console` error handling, progress bars and output; `generate`, `inspect`, `show` and `demo`
the larger commands; `settings` parses `--set key=value`.
"""
