"""What is alive in an engine, over its Unix socket: conversations with the guests of the sandboxes that it holds, and
what it is asked to do with them."""
