"""The command line: the verbs, thin.

What lives here: `app` (the verbs and how errors are said), `console` (progress and where output goes), `generating`
and `drafting` (`intaglio generate`). Everything else that a verb does is a function of the package.
"""
