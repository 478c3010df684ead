"""Pages for people: HTML made by the server. They work without JavaScript; with it, they follow what happens."""
