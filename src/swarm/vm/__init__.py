"""Virtual machines: drivers, images, templates, network slots."""
