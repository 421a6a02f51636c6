"""The command line, one file per idea; `captum_sdi.__main__` calls it.

Imports go down this list: commands, viewing, scoring, loading, pictures, results, spreadsheet, result_lines, output,
printing, tables, readers, rows, recipe, config, parser, places, shell_words, options. The last five are imported before
it is known that a command is to run, so that ``--help`` and a mistyped name are quick.
"""
