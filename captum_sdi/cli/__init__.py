"""The command line, one file per idea; `captum_sdi.__main__` calls it.

Imports go down this list: commands, loading, pictures, results, rows, recipe, options. Only commands is imported when
one is run, so that ``--help`` is quick.
"""
