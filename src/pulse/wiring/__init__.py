"""Parts of the composition root, one module for what does not fit into `app.py`; only that imports them."""
