"""Say by which proxy an endpoint is reached, by Python's rules and for every transport alike.

Python reads `http_proxy`, `https_proxy` and `no_proxy` (hosts, domains, ports, `*`), and botocore goes by that; the
HTTP client of obstore has rules of its own. Added is what Python's lack and its have: blocks of addresses
(`10.0.0.0/8`) in `no_proxy`. Reads the environment, and nothing else; any thread may enter.
"""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

__all__ = ["is_in_direct_block", "proxy_of"]


def proxy_of(origin: str) -> str | None:
    """Return the proxy that the environment names for the endpoint `origin`; None if it is reached directly."""
    url = urlsplit(origin)
    if is_in_direct_block(origin) or proxy_bypass(url.netloc):
        return None
    return getproxies().get(url.scheme)


def is_in_direct_block(origin: str) -> bool:
    """Tell whether `origin` is an address in one of the blocks that `no_proxy` names."""
    try:
        address = ip_address(urlsplit(origin).hostname or "")
    except ValueError:
        return False
    return any(_holds(block.strip(), address.compressed) for block in getproxies().get("no", "").split(","))


def _holds(block: str, address: str) -> bool:
    try:
        return "/" in block and ip_address(address) in ip_network(block, strict=False)
    except ValueError:
        return False  # a name
