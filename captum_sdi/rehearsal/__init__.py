"""What cannot work is said before the hours: every check that runs before or around the first batch of a question.

`arguments` looks at what the user passed, `ids`, `lengths`, `labels` and `cutting` at every batch, `first_example` and
`keywords` at one example of each side, `neighbours` at two, in their batch and alone; `turns` says when, and
`rehearsal` calls them all. Each check is a small function that raises or warns; add one to the list of its file.
"""
