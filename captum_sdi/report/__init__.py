"""The explorer: one HTML file in which people click through answers, their sources, and the steps at which they acted.

The file reads nothing from the network, opens from disk and in a notebook, and trusts no text.

`page` is the door; `pairs`, `texts`, `extras` and `maps` make plain lists of results; `chunks` packs them; `assembly`
puts them into ``assets/template.html``, with the page's own scripts and the library they are written with (``vendor/``).
"""

from captum_sdi.report.page import Page, write_page

__all__ = ["Page", "write_page"]
