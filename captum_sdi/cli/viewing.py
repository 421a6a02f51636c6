"""The command that opens a page. What goes wrong is an exception, of which `captum_sdi.__main__` prints one line."""

from __future__ import annotations

import webbrowser
from argparse import Namespace

from captum_sdi.cli.output import PAGE, finish_interrupted, listed_files, written_whole
from captum_sdi.cli.printing import print_line


def view(options: Namespace) -> None:
    """Run ``captum-sdi view``: write the page of saved results, if it is not there, and open it."""
    folder = options.results
    finish_interrupted(folder)
    listed = listed_files(folder)
    if PAGE not in listed or not (folder / PAGE).is_file():
        from captum_sdi.cli.results import Results  # imports torch, which a page that is there need not wait for

        results = Results.read(folder)
        with written_whole(folder, overwrite=False, keep=True) as unfinished:
            results.write_page(unfinished / PAGE)
            results.write_tensors(unfinished, [*listed, PAGE])
    print_line(folder / PAGE)
    if not options.no_open:
        webbrowser.open((folder / PAGE).absolute().as_uri())
