"""A root as one page to look at: what its store tells of the run, what it cost, and how it could be saved better."""

from cloudckpt.page.page import page_of, report_page
from cloudckpt.page.prices import Prices, prices_from

__all__ = ["Prices", "page_of", "prices_from", "report_page"]
