"""One module a page: read, decide nothing, render."""
