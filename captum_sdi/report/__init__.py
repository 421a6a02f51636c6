"""The explorer: one HTML file in which people click through answers, their sources, and the steps at which they acted.

The file reads nothing from the network, opens from disk and in a notebook, and trusts no text.

`page` is the door; `pairs`, `texts`, `extras`, `maps` make plain lists of results; `chunks` packs them; `assembly`
"""

from captum_sdi.report.page import Page, write_page

__all__ = ["Page", "write_page"]
