"""A root as one page to look at: what its store tells of the run, what it cost, and how it could be saved better."""

from cloudckpt.page.page import page_of, report_page

__all__ = ["page_of", "report_page"]
