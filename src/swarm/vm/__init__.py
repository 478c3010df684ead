"""Virtual machines: drivers, images, templates, network slots. `launcher.Launcher` brings them together."""
