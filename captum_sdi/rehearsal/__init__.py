"""What cannot work is said before the hours: every check that runs before the first batch of a question.

`arguments` looks at what the user passed, `ids` at every batch's token ids, `first_example` runs one example of each
side. Each check is a small function that raises or warns; add one to the list of its file.
"""
