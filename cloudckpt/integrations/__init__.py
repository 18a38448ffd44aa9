"""Adapters to trainers of others, one module each; a module imports its framework, and this imports none of them."""

__all__ = ()
